"""One loaded student that draws on request."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tinyflux.errors import InputError, OverloadedError
from tinyflux.model.loader import load_model
from tinyflux.model.zoo import ZooConfig, resolve_device
from tinyflux.serving.pictures import png_bytes
from tinyflux.trainer.sampling import Sampler


@dataclass
class ServeConfig:
    """A server and its limits.

    Attributes:
        host, port: where it listens; loopback by default.
        checkpoint: a directory, file or hub repository; None is the run's ``final``.
        models: more checkpoints, by the names that requests use.
        min_replicas, max_replicas: of each model; Ray Serve keeps each one's batch about full.
        cpus_per_replica, gpus_per_replica: what a replica takes.
        http_replicas: processes that answer HTTP.
        watch_checkpoint: swap in a checkpoint when its files change.
        default_size, default_steps, default_guidance: of a request that says nothing; a side in
            pixels.
        max_steps, max_prompt_chars: limits of a request; ``max_height`` and ``max_width`` are in
            latents.
        max_n: pictures of one request.
        max_body_bytes: of a request.
        timeout_s: from a request to its picture, waiting included.
        keep_pictures, keep_seconds: how many pictures are kept for ``url`` answers, how long.
        api_keys_file: one key a line; None asks for no key.
        allow_public: serve others than this machine without keys.
        log_prompts: write prompts to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    checkpoint: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    min_replicas: int = 1
    max_replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    http_replicas: int = 1
    watch_checkpoint: bool = False
    default_size: int = 512
    default_steps: int = 28
    default_guidance: float = 5.0
    max_steps: int = 100
    max_height: int = 128
    max_width: int = 128
    max_prompt_chars: int = 1000
    max_n: int = 4
    max_body_bytes: int = 65536
    timeout_s: float = 300.0
    keep_pictures: int = 256
    keep_seconds: float = 3600.0
    api_keys_file: str | None = None
    allow_public: bool = False
    log_prompts: bool = False
    max_batch: int = 8
    max_queue: int = 32


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw; sizes in pixels, a seed already chosen."""

    prompt: str
    negative_prompt: str
    num_steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int
    solver: str = "euler"
    preview_every: int = 0


@dataclass(frozen=True)
class Progress:
    step: int
    total: int
    preview: Tensor | None


@dataclass(frozen=True)
class Finished:
    image: Tensor


class Cancelled(Exception):
    pass


class Ticket:
    def __init__(self, request: ImageRequest):
        self.request = request
        self.events_queue: queue.Queue[Any] = queue.Queue()
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def events(self) -> AsyncIterator[Progress | Finished]:
        while True:
            try:
                event = self.events_queue.get_nowait()
            except queue.Empty:
                await asyncio.sleep(0.005)
                continue
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Finished):
                return

    def result(self, timeout: float | None = None) -> Tensor:
        while True:
            event = self.events_queue.get(timeout=timeout)
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finished):
                return event.image


class ImageEngine:
    """TEMPORARY: one at a time."""

    def __init__(self, config: ServeConfig, zoo: ZooConfig):
        if config.checkpoint is None:
            raise InputError("serve.checkpoint must be set")
        self.config = config
        self._device, self._dtype = resolve_device(zoo.device), zoo.dtype
        model = load_model(config.checkpoint, device=str(self._device), dtype=zoo.dtype)
        self._zoo = zoo.build(model.config)
        self._zoo.load_vae()
        self._zoo.load_t5()
        self._zoo.load_clip()
        self._sampler = Sampler(self._zoo, model, device=self._device, dtype=zoo.dtype)
        self._queue: queue.Queue[Ticket | None] = queue.Queue()
        self._waiting, self._steps, self._running = 0, 0, 0
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def pixel_limits(self) -> dict[str, int]:
        step = self._zoo.downscale
        return {
            "step": step,
            "max_height": self.config.max_height * step,
            "max_width": self.config.max_width * step,
        }

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("the engine's loop is dead")

    def stats(self) -> dict[str, Any]:
        return {
            "queue_length": self._waiting,
            "batch_size": self._running,
            "steps": self._steps,
            "step_seconds": 0.01,
            "cached_prompts": 0,
        }

    def swap(self, checkpoint: str) -> None:
        model = load_model(checkpoint, device=str(self._device), dtype=self._dtype)
        self._sampler = Sampler(self._zoo, model, device=self._device, dtype=self._dtype)

    def close(self, drain: bool = True) -> None:
        self._queue.put(None)

    def submit(self, request: ImageRequest) -> Ticket:
        self.check(request)
        if self._waiting >= self.config.max_queue:
            raise OverloadedError("the queue is full: try again later", retry_after=2.0)
        self._waiting += 1
        ticket = Ticket(request)
        self._queue.put(ticket)
        return ticket

    def generate(self, request: ImageRequest) -> bytes:
        return png_bytes(self.submit(request).result(60))

    def _loop(self) -> None:
        while (ticket := self._queue.get()) is not None:
            self._waiting -= 1
            self._running = 1
            try:
                ticket.events_queue.put(Finished(self._draw(ticket)))
            except Exception as error:
                ticket.events_queue.put(error)
            self._running = 0

    def _draw(self, ticket: Ticket) -> Tensor:
        request, step = ticket.request, self._zoo.downscale

        def told(at: int, total: int, x: Tensor) -> None:
            if ticket.cancelled:
                raise Cancelled
            self._steps += 1
            preview = None
            if request.preview_every and at % request.preview_every == 0 and at < total:
                preview = self._zoo.decode_latents(x)[0].clamp(0, 1)
            ticket.events_queue.put(Progress(at, total, preview))

        return self._sampler.generate(
            [request.prompt],
            num_steps=request.num_steps,
            guidance_scale=request.guidance_scale,
            height=request.height // step,
            width=request.width // step,
            seed=request.seed,
            negative_prompt=request.negative_prompt,
            callback=told,
        )[0]

    def check(self, request: ImageRequest) -> None:
        """Refuse what is out of bounds with an :class:`InputError` of one sentence."""
        config, step = self.config, self._zoo.downscale
        if len(request.prompt) > config.max_prompt_chars:
            raise InputError(
                f"prompt has {len(request.prompt)} characters, the limit is "
                f"{config.max_prompt_chars}"
            )
        if not 1 <= request.num_steps <= config.max_steps:
            raise InputError(
                f"num_steps must be from 1 to {config.max_steps}, not {request.num_steps}"
            )
        for name, value, limit in (
            ("height", request.height, config.max_height * step),
            ("width", request.width, config.max_width * step),
        ):
            if value % step or not step <= value <= limit:
                raise InputError(
                    f"{name} must be a multiple of {step} from {step} to {limit} pixels, "
                    f"not {value}"
                )
