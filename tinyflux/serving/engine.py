"""One loaded student that draws many requests at once, a denoising step at a time."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyflux.distributed.weights import load_student
from tinyflux.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    OverloadedError,
    ServingError,
    TinyFluxError,
)
from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.prompt_cache import PromptCache
from tinyflux.inference.request import Finished, ImageRequest, Progress, RequestHandle
from tinyflux.inference.sampler import (
    check_request,
    initial_noise,
    sample_times,
)
from tinyflux.inference.scheduler import Scheduler
from tinyflux.inference.solvers import Trajectory, check_solver, evaluations_per_step
from tinyflux.model.config import ZooConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.serving.config import ServeConfig
from tinyflux.util.device import resolve_device
from tinyflux.util.images import png_bytes

__all__ = ["Finished", "ImageEngine", "ImageRequest", "Progress", "RequestHandle"]

# Previews of one request that may wait for the decoder: beyond that the request waits for them.
MAX_PREVIEWS = 2
# Weight of the newest step in the mean step time.
RECENT = 0.1


@dataclass(eq=False)
class _Sample:
    """A request on its way.

    Attributes:
        model, weights: what it is drawn with, and that set of weights' number.
        denoised: no forward is wanted any more.
        previews: how many wait for the decoder.
        path, cond, uncond: there once its prompts are encoded; ``uncond`` is None without
            guidance.
    """

    request: ImageRequest
    model: TinyFluxDeep
    weights: int
    ticket: RequestHandle = dataclasses.field(init=False)
    path: Trajectory = dataclasses.field(init=False)
    cond: TextCondition = dataclasses.field(init=False)
    uncond: TextCondition | None = None
    evaluations: int = 0
    denoised: bool = False
    previews: int = 0


class ImageEngine:
    """Draws many requests at once, each as :class:`~tinyflux.inference.sampler.Sampler` would.

    One thread runs the denoising loop: it asks the
    :class:`~tinyflux.inference.scheduler.Scheduler` whose turn it is, runs one forward for up to
    ``max_batch`` pictures of one size, each at its own time with its own solver, prompt and
    guidance, and asks again. So requests join and leave between steps, sizes take turns, and a
    short request passes long ones. Prompts are encoded in a second thread and latents decoded in
    a third, on streams of their own on a GPU.

    An error of one request's encoding or decoding is that request's alone, and a forward that
    finds no memory is its batch's. Any other error of the loop ends it: every ticket fails, and
    so does :meth:`check_health`.

    Args:
        config: its limits, and the checkpoint.
        zoo: where the text encoders and the VAE are.

    Raises:
        TinyFluxError: a limit makes no sense, or the checkpoint or a model cannot be opened.
    """

    def __init__(self, config: ServeConfig, zoo: ZooConfig):
        if config.checkpoint is None:
            raise InputError("serve.checkpoint must be set")
        config.check_limits()
        self.config = config
        self._device, self._dtype = resolve_device(zoo.device), zoo.dtype
        self._model = load_student(config.checkpoint, str(self._device), self._dtype)
        self._weights = 0
        self._zoo = zoo.build(self._model.config)
        self._zoo.load_vae()
        self._zoo.load_t5()
        self._zoo.load_clip()
        self._prompts = PromptCache(self._zoo, config.prompt_cache, self._device, self._dtype)

        self._changed = threading.Condition()  # guards all below
        self._turns: Scheduler[_Sample] = Scheduler(config.max_batch)
        self._open: dict[_Sample, None] = {}  # accepted and not ended, in order of arrival
        self._batch: list[_Sample] = []
        self._closed = False
        self._dead: ServingError | None = None
        self._steps, self._step_seconds, self._evaluation_seconds = 0, 0.0, 0.0

        self._encoder = self._side_thread("encoder")
        self._decoder = self._side_thread("decoder")
        self._thread = threading.Thread(target=self._loop, name="denoiser", daemon=True)
        self._thread.start()

    # From any thread

    def pixel_limits(self) -> dict[str, int]:
        """``step``, which divides both sides of a picture, ``max_height`` and ``max_width``."""
        step = self._zoo.downscale
        return {
            "step": step,
            "max_height": self.config.max_height * step,
            "max_width": self.config.max_width * step,
        }

    def check(self, request: ImageRequest) -> None:
        """Refuse what is out of bounds with an :class:`InputError` of one sentence."""
        config, limits = self.config, self.pixel_limits()
        step = limits["step"]
        if not request.prompt.strip():
            raise InputError("prompt is empty: say what the picture should show")
        for name, text in (
            ("prompt", request.prompt),
            ("negative_prompt", request.negative_prompt),
        ):
            if len(text) > config.max_prompt_chars:
                raise InputError(
                    f"{name} has {len(text)} characters, the limit is {config.max_prompt_chars}"
                )
        if not 1 <= request.num_steps <= config.max_steps:
            raise InputError(
                f"num_steps must be from 1 to {config.max_steps}, not {request.num_steps}"
            )
        for name, value in (("height", request.height), ("width", request.width)):
            limit = limits[f"max_{name}"]
            if value % step or not step <= value <= limit:
                raise InputError(
                    f"{name} must be a multiple of {step} from {step} to {limit} pixels, "
                    f"not {value}"
                )
        if request.preview_every < 0:
            raise InputError(f"preview_every must be 0 or more, not {request.preview_every}")
        check_solver(request.solver)
        check_request(
            request.height // step,
            request.width // step,
            request.num_steps,
            request.guidance_scale,
            [request.seed],
        )

    def check_defaults(self) -> None:
        """Refuse a config whose defaults are outside of its limits, sizes included.

        Raises:
            ConfigError: a request that says nothing would be refused, and why.
        """
        config = self.config
        size, steps, guidance = config.default_size, config.default_steps, config.default_guidance
        try:
            self.check(ImageRequest("a prompt", "", steps, guidance, size, size, 0))
        except InputError as error:
            raise ConfigError(
                f"a request that says nothing would be refused ({error}): set serve.default_size, "
                "serve.default_steps and serve.default_guidance within the server's limits"
            ) from error

    def submit(self, request: ImageRequest) -> RequestHandle:
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
            sample = _Sample(request, self._model, self._weights)
            sample.ticket = RequestHandle(lambda: self._cancel(sample))
            sample.evaluations = request.num_steps * evaluations_per_step(request.solver)
            self._open[sample] = None
            self._encoder.submit(self._encode, sample)
        return sample.ticket

    def generate(self, request: ImageRequest) -> bytes:
        """The picture as PNG.

        Raises:
            TinyFluxError: as :meth:`submit` and :meth:`RequestHandle.result`.
        """
        return png_bytes(self.submit(request).result())

    def swap(self, checkpoint: str) -> None:
        """Draw with another checkpoint of the same config from now on.

        Requests that were accepted before are finished with the weights they began with, which
        stay in memory until then.

        Raises:
            TinyFluxError: it cannot be opened, or is of another config; nothing has changed then.
        """
        model = load_student(checkpoint, str(self._device), self._dtype)
        old, new = self._model.config.to_dict(), model.config.to_dict()
        other = [name for name in old if old[name] != new[name]]
        if other:
            raise CheckpointError(
                f"'{checkpoint}' is of another config than what is served (it differs in "
                f"{', '.join(other)}): start a server of its own for it"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the copies are whole before the loop reads them
        with self._changed:
            self._model, self._weights = model, self._weights + 1

    def stats(self) -> dict[str, Any]:
        """How it goes: ``queue_length`` (requests that are accepted and not in the batch),
        ``batch_size``, ``steps`` (forwards done), ``step_seconds`` (their recent mean) and
        ``cached_prompts``.
        """
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

    def _cancel(self, sample: _Sample) -> None:
        if sample.ticket.fail(ServingError("the request was cancelled")):
            self._end(sample)

    def _end(self, sample: _Sample) -> None:
        """Forget a sample whose ticket has ended."""
        with self._changed:
            self._open.pop(sample, None)
            if sample not in self._batch:  # else the loop removes it after the step
                self._turns.remove(sample)
            self._changed.notify_all()

    def _fail(self, sample: _Sample, doing: str, error: Exception) -> None:
        """End a request with an error of its own: a user's mistake as it is, others wrapped."""
        told = error
        if not isinstance(error, TinyFluxError):
            told = ServingError(f"the picture failed while {doing}: {error!r:.200}")
            told.__cause__ = error
        sample.ticket.fail(told)
        self._end(sample)

    def _fail_all(self, error: ServingError) -> None:
        with self._changed:
            samples = list(self._open)
        for sample in samples:
            sample.ticket.fail(error)
            self._end(sample)

    def _backlog_seconds(self) -> float:
        """About how long it takes to draw what is accepted now."""
        wanted = sum(sample.evaluations for sample in self._open if not sample.denoised)
        return max(1.0, wanted * self._evaluation_seconds)

    # The encoder's thread

    def _side_thread(self, name: str) -> ThreadPoolExecutor:
        """One thread; on a GPU its work goes to a stream of its own."""

        def own_stream() -> None:
            torch.cuda.set_stream(torch.cuda.Stream(self._device))

        initializer = own_stream if self._device.type == "cuda" else None
        return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=initializer)

    @torch.inference_mode()
    def _encode(self, sample: _Sample) -> None:
        if sample.ticket.ended:
            return
        request, config, step = sample.request, sample.model.config, self._zoo.downscale
        height, width = request.height // step, request.width // step
        try:
            sample.cond, sample.ticket.cut = self._prompts(request.prompt)
            if request.guidance_scale != 1.0:
                sample.uncond, sample.ticket.negative_cut = self._prompts(request.negative_prompt)
            x = initial_noise([request.seed], config.in_channels, height, width)[0]
            times = sample_times(config, request.num_steps, height, width)
            sample.path = Trajectory(x.to(self._device), times, request.solver)
            self._hand_over(sample)
        except Exception as error:
            self._fail(sample, "its prompt was encoded", error)
            return
        with self._changed:
            if not sample.ticket.ended:
                self._turns.add(sample, (height, width, sample.weights), sample.evaluations)
                self._changed.notify_all()

    def _hand_over(self, sample: _Sample) -> None:
        """Make what this thread's stream computed whole, and the loop's stream its user."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
            loop = torch.cuda.default_stream(self._device)
            sample.path.x.record_stream(loop)
            for condition in (sample.cond, sample.uncond):
                if condition is not None:
                    condition.t5.record_stream(loop)
                    condition.pooled.record_stream(loop)

    # The loop's thread

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                last: torch.cuda.Event | None = None
                while batch := self._next_batch():
                    started = time.monotonic()
                    try:
                        steps = self._advance(batch)
                    except torch.OutOfMemoryError as error:
                        for sample in batch:
                            self._fail(sample, "it was denoised", error)
                        steps = []
                    for sample in steps:
                        self._tell(sample)
                    # One step ahead of the GPU: it never idles, and who joins waits for little.
                    if last is not None:
                        last.synchronize()
                    last = self._mark()
                    self._account(batch, time.monotonic() - started)
        except BaseException as error:
            self._dead = ServingError(f"the engine's loop broke: {error!r:.200}")
            self._dead.__cause__ = error
            with self._changed:
                self._batch = []
            self._fail_all(self._dead)

    def _next_batch(self) -> list[_Sample]:
        """Whose turn it is; waits for samples, and is empty when there will be none."""
        with self._changed:
            while not (batch := self._turns.next()):
                if self._closed and not self._open:
                    return []
                self._changed.wait()
            self._batch = batch
            return batch

    def _advance(self, batch: list[_Sample]) -> list[_Sample]:
        """One forward; the samples that ended a step by it."""
        # Those with guidance stand in front: only they need a second row.
        guided = [sample for sample in batch if sample.uncond is not None]
        batch = guided + [sample for sample in batch if sample.uncond is None]
        negative = [sample.uncond for sample in guided if sample.uncond is not None]
        scales = [sample.request.guidance_scale for sample in guided]
        v = guided_velocity(
            batch[0].model,
            torch.stack([sample.path.x for sample in batch]),
            self._on_device([sample.path.t for sample in batch]),
            _together([sample.cond for sample in batch]),
            _together(negative) if negative else None,
            self._on_device(scales),
        )
        return [sample for sample, each in zip(batch, v, strict=True) if sample.path.advance(each)]

    def _on_device(self, values: list[float]) -> Tensor:
        """``[len(values)]``, without waiting for the GPU."""
        found = torch.tensor(values)
        if self._device.type != "cuda":
            return found
        return found.pin_memory().to(self._device, non_blocking=True)

    def _mark(self) -> "torch.cuda.Event | None":
        """On a GPU, the moment at which what was asked for so far is done."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _tell(self, sample: _Sample) -> None:
        """Pass on that a step has ended, and what it gave."""
        if sample.ticket.ended:
            return
        path, every = sample.path, sample.request.preview_every
        event = Progress(path.step, path.total, None)
        if not every:
            sample.ticket.tell(event)
        elif path.step % every or path.step == path.total:
            # By the decoder's thread, so that it does not overtake a preview.
            self._decoder.submit(sample.ticket.tell, event)
        else:
            with self._changed:
                sample.previews += 1
                if sample.previews >= MAX_PREVIEWS:
                    self._turns.hold(sample, True)
            self._decoder.submit(self._preview, sample, event, path.data(), self._mark())
        if path.step == path.total:
            sample.denoised = True
            self._decoder.submit(self._finish, sample, path.x, self._mark())

    def _account(self, batch: list[_Sample], seconds: float) -> None:
        """Note what a step took, and let those go that want no other."""
        with self._changed:
            self._steps += 1
            weight = RECENT if self._steps > 1 else 1.0
            self._step_seconds += weight * (seconds - self._step_seconds)
            each = seconds / len(batch)
            self._evaluation_seconds += weight * (each - self._evaluation_seconds)
            self._turns.charge(batch, seconds)
            self._batch = []
            for sample in batch:
                sample.evaluations = sample.path.evaluations
                if sample.ticket.ended:
                    self._turns.remove(sample)

    # The decoder's thread

    def _preview(
        self, sample: _Sample, event: Progress, x: Tensor, made: "torch.cuda.Event | None"
    ) -> None:
        try:
            if not sample.ticket.ended:
                sample.ticket.tell(dataclasses.replace(event, preview=self._decode(x, made)))
        except Exception as error:
            self._fail(sample, "a preview was decoded", error)
        with self._changed:
            sample.previews -= 1
            self._turns.hold(sample, False)
            self._changed.notify_all()

    def _finish(self, sample: _Sample, x: Tensor, made: "torch.cuda.Event | None") -> None:
        try:
            if not sample.ticket.ended:
                sample.ticket.tell(Finished(self._decode(x, made)))
        except Exception as error:
            self._fail(sample, "it was decoded", error)
        else:
            self._end(sample)

    @torch.inference_mode()
    def _decode(self, x: Tensor, made: "torch.cuda.Event | None") -> Tensor:
        """``[3, H, W]`` in [0, 1] on the CPU of latents ``[C, h, w]``, there at ``made``."""
        if made is not None:
            made.wait()
            x.record_stream(torch.cuda.current_stream(self._device))
        shift = self._model.config.latent_shift
        return self._zoo.decode_latents(x[None], shift=shift)[0].float().clamp(0, 1).cpu()


def _together(conditions: list[TextCondition]) -> TextCondition:
    """Conditions ``[1, ...]`` as one ``[B, ...]``."""
    t5 = torch.cat([each.t5 for each in conditions])
    return TextCondition(t5, torch.cat([each.pooled for each in conditions]))
