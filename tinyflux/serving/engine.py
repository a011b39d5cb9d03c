"""One loaded student that draws on request."""

import threading
from dataclasses import dataclass

from tinyflux.errors import InputError
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
        num_replicas, cpus_per_replica, gpus_per_replica: what Ray Serve runs.
        max_steps, max_prompt_chars: limits of a request; ``max_height`` and ``max_width`` are in
            latents.
        max_body_bytes: of a request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    checkpoint: str | None = None
    num_replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    max_steps: int = 100
    max_height: int = 128
    max_width: int = 128
    max_prompt_chars: int = 1000
    max_body_bytes: int = 65536


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


class ImageEngine:
    """Draws one request at a time, from any thread.

    :meth:`generate` is the seam for batching at the level of steps: the sampler's pure stepping
    functions take a time per sample, so requests at different steps can share a forward.
    """

    def __init__(self, config: ServeConfig, zoo: ZooConfig):
        if config.checkpoint is None:
            raise InputError("serve.checkpoint must be set")
        self.config = config
        device = resolve_device(zoo.device)
        model = load_model(config.checkpoint, device=str(device), dtype=zoo.dtype)
        self._zoo = zoo.build(model.config)
        self._zoo.load_vae()
        self._zoo.load_t5()
        self._zoo.load_clip()
        self._sampler = Sampler(self._zoo, model, device=device, dtype=zoo.dtype)
        self._lock = threading.Lock()

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

    def generate(self, request: ImageRequest) -> bytes:
        """The picture as PNG.

        Raises:
            InputError: the request is out of bounds, or its prompt is empty or too long.
        """
        self.check(request)
        step = self._zoo.downscale
        with self._lock:
            images = self._sampler.generate(
                [request.prompt],
                num_steps=request.num_steps,
                guidance_scale=request.guidance_scale,
                height=request.height // step,
                width=request.width // step,
                seed=request.seed,
                negative_prompt=request.negative_prompt,
            )
        return png_bytes(images[0])
