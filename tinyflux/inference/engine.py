"""One loaded student that draws many requests at once, a denoising step at a time."""

import dataclasses
import threading
import time
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from tinyflux.errors import (
    CheckpointError,
    OverloadedError,
    ServingError,
    TinyFluxError,
)
from tinyflux.inference.batch import Sample, advance
from tinyflux.inference.checks import check_request
from tinyflux.inference.config import EngineConfig, PixelLimits
from tinyflux.inference.events import Step
from tinyflux.inference.prompt_cache import PromptCache, PromptEncoders
from tinyflux.inference.request import RequestHandle, SampleRequest
from tinyflux.inference.sampler import initial_noise, sample_times
from tinyflux.inference.scheduler import Scheduler
from tinyflux.inference.solvers import Trajectory, evaluations_per_step
from tinyflux.inference.streams import Moment, hand_over, mark, side_thread, take_over
from tinyflux.model.model import TinyFluxDeep
from tinyflux.util.images import png_bytes

# Previews of one request that may wait for the decoder: beyond that the request waits for them.
MAX_PREVIEWS = 2
# Weight of the newest step in the mean step time.
RECENT = 0.1


class EngineStats(TypedDict):
    """How an engine is doing.

    Attributes:
        queue_length: requests that are accepted and not in the batch.
        batch_size: requests in the batch.
        steps: forwards done.
        step_seconds: the recent mean of what one took.
        cached_prompts: prompts that are kept encoded.
    """

    queue_length: int
    batch_size: int
    steps: int
    step_seconds: float
    cached_prompts: int


class EngineModels(PromptEncoders, Protocol):
    """What the engine needs of a ModelZoo: prompts encoded, latents decoded."""

    @property
    def downscale(self) -> int:
        """Pixels of a latent's side."""
        ...

    def decode_latents(self, latents: Tensor, shift: float | None = None) -> Tensor: ...


class ImageEngine:
    """Draws many requests at once, each as :class:`~tinyflux.inference.sampler.Sampler` would.

    One thread runs the denoising loop: it asks the
    :class:`~tinyflux.inference.scheduler.Scheduler` whose turn it is, runs one forward for up to
    ``max_batch`` pictures of one size, each at its own time with its own solver, prompt and
    guidance, and asks again. So requests join and leave between steps, sizes take turns, and a
    short request passes long ones. Prompts are encoded in a second thread and latents decoded in
    a third, on streams of their own on a GPU.

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
        self._model, self._weights = model.eval(), 0
        weight = next(model.parameters())
        self._device = weight.device
        self._prompts = PromptCache(zoo, config.prompt_cache, weight.device, weight.dtype)

        self._changed = threading.Condition()  # guards all below
        self._scheduler: Scheduler[Sample] = Scheduler(config.max_batch)
        self._open: dict[Sample, None] = {}  # accepted and not ended, in order of arrival
        self._batch: list[Sample] = []
        self._closed = False
        self._dead: ServingError | None = None
        self._steps, self._step_seconds, self._evaluation_seconds = 0, 0.0, 0.0

        self._encoder = side_thread("encoder", self._device)
        self._decoder = side_thread("decoder", self._device)
        self._thread = threading.Thread(target=self._loop, name="denoiser", daemon=True)
        self._thread.start()

    # From any thread

    def pixel_limits(self) -> PixelLimits:
        """The sizes that can be asked for."""
        step = self.zoo.downscale * self._model.config.patch_size
        return PixelLimits(step, self.config.max_height, self.config.max_width)

    def check(self, request: SampleRequest) -> None:
        """Refuse what is out of bounds with an :class:`InputError` of one sentence."""
        check_request(request, self.config, self.pixel_limits())

    def submit(self, request: SampleRequest) -> RequestHandle:
        """Accept a request; does not wait for anything.

        Raises:
            InputError: the request is out of bounds.
            OverloadedError: ``max_queue`` requests wait already.
            ServingError: the engine is closed or broken.
        """
        self.check(request)
        with self._changed:
            if self._dead is not None:
                raise self._dead
            if self._closed:
                raise ServingError("the engine is closed and takes no more requests")
            if len(self._open) >= self.config.max_batch + self.config.max_queue:
                seconds = self._backlog_seconds() / 2
                raise OverloadedError(
                    f"{len(self._open)} pictures are being drawn or wait, which is all there is "
                    f"room for: try again in {seconds:.0f} seconds",
                    seconds,
                )
            sample = Sample(request, self._model, self._weights)
            sample.handle = RequestHandle(lambda: self._cancel(sample))
            sample.evaluations = request.num_steps * evaluations_per_step(request.solver)
            self._open[sample] = None
            self._encoder.submit(self._encode, sample)
        return sample.handle

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
            CheckpointError: it is of another config; nothing has changed then.
        """
        old, new = self._model.config.to_dict(), model.config.to_dict()
        other = [name for name in old if old[name] != new[name]]
        if other:
            raise CheckpointError(
                "the new checkpoint is of another config than what is served (it differs in "
                f"{', '.join(other)}): start a server of its own for it"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies are whole before the loop reads them
        with self._changed:
            self._model, self._weights = model.eval(), self._weights + 1

    def stats(self) -> EngineStats:
        """How the engine is doing now."""
        with self._changed:
            wanted = sum(not sample.denoised for sample in self._open)
            return {
                "queue_length": max(wanted - len(self._batch), 0),
                "batch_size": len(self._batch),
                "steps": self._steps,
                "step_seconds": self._step_seconds,
                "cached_prompts": len(self._prompts),
            }

    def check_health(self) -> None:
        """Raise a :class:`ServingError` if no picture will come any more."""
        if self._dead is not None:
            raise self._dead
        if self._closed:
            raise ServingError("the engine is closed")

    def close(self, drain: bool = True) -> None:
        """Take no more requests, finish the accepted ones (or fail them), and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if drain:
            with self._changed:
                self._changed.wait_for(lambda: not self._open)
        self._fail_all(ServingError("the engine was closed before the picture was drawn"))
        self._thread.join()
        self._encoder.shutdown()
        self._decoder.shutdown()

    def _cancel(self, sample: Sample) -> None:
        if sample.handle.fail(ServingError("the request was cancelled")):
            self._end(sample)

    def _end(self, sample: Sample) -> None:
        """Forget a sample whose request has ended."""
        with self._changed:
            self._open.pop(sample, None)
            if sample not in self._batch:  # else the loop removes it after the step
                self._scheduler.remove(sample)
            self._changed.notify_all()

    def _fail(self, sample: Sample, doing: str, error: Exception) -> None:
        """End a request with an error of its own: a user's mistake as it is, others wrapped."""
        told = error
        if not isinstance(error, TinyFluxError):
            told = ServingError(f"the picture failed while {doing}: {error!r:.200}")
            told.__cause__ = error
        sample.handle.fail(told)
        self._end(sample)

    def _fail_all(self, error: ServingError) -> None:
        with self._changed:
            samples = list(self._open)
        for sample in samples:
            sample.handle.fail(error)
            self._end(sample)

    def _backlog_seconds(self) -> float:
        """About how long it takes to draw what is accepted now."""
        wanted = sum(sample.evaluations for sample in self._open if not sample.denoised)
        return max(1.0, wanted * self._evaluation_seconds)

    # The encoder's thread

    @torch.inference_mode()
    def _encode(self, sample: Sample) -> None:
        if sample.handle.ended:
            return
        request, config, step = sample.request, sample.model.config, self.zoo.downscale
        height, width = request.height // step, request.width // step
        try:
            sample.cond, sample.handle.cut = self._prompts(request.prompt)
            if request.guidance_scale != 1.0:
                sample.uncond, sample.handle.negative_cut = self._prompts(request.negative_prompt)
            x = initial_noise([request.seed], config.in_channels, height, width)[0]
            times = sample_times(config, request.num_steps, height, width)
            sample.path = Trajectory(x.to(self._device), times, request.solver)
            hand_over(sample.tensors(), self._device)
        except Exception as error:
            self._fail(sample, "its prompt was encoded", error)
            return
        with self._changed:
            if not sample.handle.ended:
                self._scheduler.add(sample, (height, width, sample.weights), sample.evaluations)
                self._changed.notify_all()

    # The loop's thread

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                last: Moment | None = None
                while batch := self._next_batch():
                    started = time.monotonic()
                    try:
                        steps = advance(batch)
                    except torch.OutOfMemoryError as error:
                        for sample in batch:
                            self._fail(sample, "it was denoised", error)
                        steps = []
                    for sample in steps:
                        self._tell(sample)
                    # One step ahead of the GPU: it never idles, and who joins waits for little.
                    if last is not None:
                        last.synchronize()
                    last = mark(self._device)
                    self._account(batch, time.monotonic() - started)
        except BaseException as error:
            self._dead = ServingError(f"the engine's loop broke: {error!r:.200}")
            self._dead.__cause__ = error
            with self._changed:
                self._batch = []
            self._fail_all(self._dead)

    def _next_batch(self) -> list[Sample]:
        """Whose turn it is; waits for samples, and is empty when there will be none."""
        with self._changed:
            while not (batch := self._scheduler.next()):
                if self._closed and not self._open:
                    return []
                self._changed.wait()
            self._batch = batch
            return batch

    def _tell(self, sample: Sample) -> None:
        """Pass on that a step has ended, and what it gave."""
        if sample.handle.ended:
            return
        path, every = sample.path, sample.request.preview_every
        event = Step(path.step, path.total, None)
        if not every:
            sample.handle.tell(event)
        elif path.step % every or path.step == path.total:
            # By the decoder's thread, so that it does not overtake a preview.
            self._decoder.submit(sample.handle.tell, event)
        else:
            with self._changed:
                sample.previews += 1
                if sample.previews >= MAX_PREVIEWS:
                    self._scheduler.hold(sample, True)
            self._decoder.submit(self._preview, sample, event, path.data(), mark(self._device))
        if path.step == path.total:
            sample.denoised = True
            self._decoder.submit(self._finish, sample, path.x, mark(self._device))

    def _account(self, batch: list[Sample], seconds: float) -> None:
        """Note what a step took, and let those go that want no other."""
        with self._changed:
            self._steps += 1
            weight = RECENT if self._steps > 1 else 1.0
            self._step_seconds += weight * (seconds - self._step_seconds)
            each = seconds / len(batch)
            self._evaluation_seconds += weight * (each - self._evaluation_seconds)
            self._scheduler.charge(batch, seconds)
            self._batch = []
            for sample in batch:
                sample.evaluations = sample.path.evaluations
                if sample.handle.ended:
                    self._scheduler.remove(sample)

    # The decoder's thread

    def _preview(self, sample: Sample, event: Step, x: Tensor, made: Moment | None) -> None:
        try:
            if not sample.handle.ended:
                preview = png_bytes(self._decode(x, made))
                sample.handle.tell(dataclasses.replace(event, preview=preview))
        except Exception as error:
            self._fail(sample, "a preview was decoded", error)
        with self._changed:
            sample.previews -= 1
            self._scheduler.hold(sample, False)
            self._changed.notify_all()

    def _finish(self, sample: Sample, x: Tensor, made: Moment | None) -> None:
        try:
            if not sample.handle.ended:
                image = self._decode(x, made)
                sample.handle.finish(image, png_bytes(image))
        except Exception as error:
            self._fail(sample, "it was decoded", error)
        else:
            self._end(sample)

    @torch.inference_mode()
    def _decode(self, x: Tensor, made: Moment | None) -> Tensor:
        """``[3, H, W]`` in [0, 1] on the CPU of latents ``[C, h, w]``, there at ``made``."""
        take_over(x, made)
        shift = self._model.config.latent_shift
        return self.zoo.decode_latents(x[None], shift=shift)[0].float().clamp(0, 1).cpu()
