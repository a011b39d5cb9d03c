"""One loaded student that draws many requests at once, a denoising step at a time."""

import itertools
from typing import NamedTuple, Protocol

import torch

from tinyflux.errors import CheckpointError
from tinyflux.inference.checks import check_adapter, check_request
from tinyflux.inference.config import EngineConfig, PixelLimits
from tinyflux.inference.core import EngineCore
from tinyflux.inference.input_processor import InputModels, InputProcessor
from tinyflux.inference.output_processor import LatentDecoder, OutputProcessor
from tinyflux.inference.request import RequestHandle, SampleRequest
from tinyflux.inference.request_pool import PoolStats, RequestPool
from tinyflux.inference.request_state import RequestState
from tinyflux.model.adapters import named_adapters
from tinyflux.model.model import TinyFluxDeep


class EngineStats(PoolStats):
    """How an engine is doing.

    Attributes:
        cached_prompts: prompts that are kept encoded.
    """

    cached_prompts: int


class EngineModels(InputModels, LatentDecoder, Protocol):
    """What the engine needs of a ModelZoo: prompts encoded, latents decoded."""


class LoadedStudent(NamedTuple):
    """What new requests are drawn with; each swap's version is another."""

    model: TinyFluxDeep
    version: int


class ImageEngine:
    """Draws many requests at once, each as :class:`~tinyflux.inference.sampler.Sampler` would.

    One thread runs the denoising loop, :class:`~tinyflux.inference.core.EngineCore`: it asks the
    :class:`~tinyflux.inference.scheduler.Scheduler` whose turn it is, runs one forward for up to
    ``max_batch`` pictures of one size, each at its own time with its own solver, prompt and
    guidance, and asks again. So requests join and leave between steps, sizes take turns, and a
    short request passes long ones. Prompts are encoded in a second thread
    (:class:`~tinyflux.inference.input_processor.InputProcessor`) and latents decoded in a third
    (:class:`~tinyflux.inference.output_processor.OutputProcessor`), on streams of their own on a
    GPU.

    An error of one request's encoding or decoding is that request's alone, and a forward that
    finds no memory is its batch's. Any other error of the loop ends it: every request fails, and
    so does :meth:`check_health`.

    Args:
        model: the student, in the precision and on the device to draw with; its config may not
            change while the engine lives, its weights by :meth:`swap`.
        zoo: the frozen models, loaded.
        config: the engine's limits.
    """

    def __init__(self, model: TinyFluxDeep, zoo: EngineModels, config: EngineConfig):
        self.config, self.zoo = config, zoo
        self._versions = itertools.count()
        # Replaced as a whole: who reads it needs no lock.
        self._student = LoadedStudent(model.eval(), next(self._versions))
        weight = next(model.parameters())
        self._device = weight.device
        self._pool = RequestPool(config.max_batch, config.max_queue)
        self._inputs = InputProcessor(
            zoo, self._pool, config.prompt_cache, weight.device, weight.dtype
        )
        self._outputs = OutputProcessor(zoo, self._pool, weight.device)
        self._core = EngineCore(self._pool, self._outputs, weight.device)

    def pixel_limits(self) -> PixelLimits:
        """The sizes that can be asked for."""
        step = self.zoo.downscale * self._student.model.config.patch_size
        return PixelLimits(step, self.config.max_height, self.config.max_width)

    def check(self, request: SampleRequest) -> None:
        """Refuse what is out of bounds with an :class:`InputError` of one sentence."""
        check_request(request, self.config, self.pixel_limits())
        check_adapter(request, named_adapters(self._student.model))

    def submit(self, request: SampleRequest) -> RequestHandle:
        """Accept a request; does not wait for anything.

        Raises:
            InputError: the request is out of bounds.
            OverloadedError: ``max_queue`` requests wait already.
            ServingError: the engine is closed or broken.
        """
        self.check(request)
        state = RequestState(request, *self._student)
        state.handle = RequestHandle(lambda: self._pool.cancel(state))
        self._pool.admit(state, begin=self._inputs.submit)
        return state.handle

    def generate(self, request: SampleRequest) -> bytes:
        """The picture as PNG.

        Raises:
            TinyFluxError: as :meth:`submit` and :meth:`RequestHandle.result`.
        """
        handle = self.submit(request)
        handle.result()
        return handle.png

    def swap(self, model: TinyFluxDeep) -> None:
        """Draw with another model of the same config from now on.

        Requests that were accepted before are finished with the weights they began with, which
        stay in memory until then.

        Raises:
            CheckpointError: it is of another config, or has other adapters; nothing has changed
                then.
        """
        old, new = self._student.model.config.to_dict(), model.config.to_dict()
        other = [name for name in old if old[name] != new[name]]
        if other:
            raise CheckpointError(
                "the new checkpoint is of another config than what is served (it differs in "
                f"{', '.join(other)}): start a server of its own for it"
            )
        if named_adapters(model) != named_adapters(self._student.model):
            raise CheckpointError(
                "the new checkpoint has other adapters than what is served: start a server of its "
                "own for it"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies are whole before the loop reads them
        self._student = LoadedStudent(model.eval(), next(self._versions))

    def stats(self) -> EngineStats:
        """How the engine is doing now."""
        return {**self._pool.stats(), "cached_prompts": self._inputs.cached_prompts}

    def check_health(self) -> None:
        """Raise a :class:`ServingError` if no picture will come any more."""
        self._pool.check_open()

    def close(self, drain: bool = True) -> None:
        """Take no more requests, finish the accepted ones (or fail them), and end the threads."""
        self._pool.close(drain)
        self._core.join()
        self._inputs.close()
        self._outputs.close()
