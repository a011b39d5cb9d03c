"""The ``serve`` section of a run file."""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

from tinyflux.errors import ConfigError, InputError
from tinyflux.util.limits import MAX_STEPS
from tinyflux.util.picture_size import FormerSides, PictureSize, check_side, parse_size

_BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "http_replicas": (1, math.inf),
    "cpus_per_replica": (0, math.inf),
    "gpus_per_replica": (0, math.inf),
    "default_size": (1, math.inf),
    "default_steps": (1, MAX_STEPS),
    "default_guidance": (0, 100),
    "max_steps": (1, MAX_STEPS),
    "max_prompt_chars": (1, math.inf),
    "max_n": (1, math.inf),
    "max_body_bytes": (1, math.inf),
    "max_batch": (1, math.inf),
    "max_queue": (0, math.inf),
    "prompt_cache": (0, math.inf),
    "keep_pictures": (1, math.inf),
}
_MAX_SIDE = 1024  # pixels of either side, where nothing is said
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass
class ServeConfig:
    """A server and its limits.

    Attributes:
        host: The address at which it listens; loopback by default.
        port: The port at which it listens.
        checkpoint: A checkpoint's directory, file, hub repository or URL; None is the run's
            ``final``.
        models: More checkpoints, by the names that requests use.
        adapters: LoRA adapters of the one student that is served, by the names that requests use:
            directories, hub repositories or URLs.
        min_replicas: The fewest replicas of each model.
        max_replicas: The most replicas of each model; Ray Serve keeps each one's batch about full.
        scale_up_seconds: How long there must be too much to do before a replica is added.
        scale_down_seconds: How long there must be too little to do before one goes.
        cpus_per_replica: CPUs that Ray reserves for a replica.
        gpus_per_replica: GPUs that Ray reserves for a replica; 0 draws on CPUs.
        http_replicas: Number of processes that answer HTTP.
        watch_checkpoint: Swap in a checkpoint when its files change.
        default_size: Sides, in pixels, of a request that names none.
        default_steps: Denoising steps of a request that names none.
        default_guidance: Guidance scale of a request that names none.
        max_steps: The most denoising steps of a request.
        max_size: The largest width and height of a request in pixels: 1024, or such as 1024x768
            for a width and a height; None: 1024.
        max_height: The largest height in latents, the former way to say ``max_size``; it goes with
            the next release.
        max_width: The largest width in latents, as ``max_height``.
        max_prompt_chars: The longest prompt, in characters.
        max_n: The most pictures of one request.
        max_body_bytes: The largest body of a request.
        max_batch: Pictures of one forward; one with guidance takes two of its rows.
        max_queue: Requests that may wait beside ``max_batch`` that are drawn.
        prompt_cache: Number of encoded prompts that are kept.
        timeout_s: Seconds from a request to its picture, waiting included.
        receive_seconds: Seconds in which a request's body must have come.
        keep_pictures: How many pictures are kept for ``url`` answers.
        keep_seconds: How long a picture is kept for ``url`` answers.
        api_keys_file: A file of keys, one a line; None asks for no key.
        allow_public: Serve others than this machine without keys.
        log_prompts: Write prompts to the log.
        allowed_hosts: Names beside those of this machine by which the server is asked, such as
            ``draw.example.org`` or ``*.example.org``, and whose pages may ask it. Without any, a
            server with keys and one with ``allow_public`` answer to every name.
    """

    former_sides: ClassVar = FormerSides("serve", "max_size", "max_height", "max_width")

    host: str = "127.0.0.1"
    port: int = 8000
    checkpoint: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    min_replicas: int = 1
    max_replicas: int = 1
    scale_up_seconds: float = 10.0
    scale_down_seconds: float = 300.0
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    http_replicas: int = 1
    watch_checkpoint: bool = False
    default_size: int = 512
    default_steps: int = 28
    default_guidance: float = 5.0
    max_steps: int = 100
    max_size: int | str | None = None
    max_height: int | None = None
    max_width: int | None = None
    max_prompt_chars: int = 1000
    max_n: int = 4
    max_body_bytes: int = 65536
    max_batch: int = 8
    max_queue: int = 64
    prompt_cache: int = 256
    timeout_s: float = 300.0
    receive_seconds: float = 30.0
    keep_pictures: int = 256
    keep_seconds: float = 3600.0
    api_keys_file: str | None = None
    allow_public: bool = False
    log_prompts: bool = False
    allowed_hosts: list[str] = field(default_factory=list)

    def check_limits(self) -> None:
        """Refuse a setting that makes no sense by itself.

        Raises:
            ConfigError: it says which, and what it may be.
        """
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:  # nan is not, either
                bounds = f"{least} or more" if most == math.inf else f"from {least} to {most}"
                raise ConfigError(f"serve.{name} must be {bounds}, not {value}")
        self.former_sides.check(self)
        for name in ("timeout_s", "receive_seconds", "keep_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"serve.{name} must be above 0 and finite, not {value}")
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"serve.allowed_hosts: '{host}' cannot be a host: write such as "
                    "draw.example.org or *.example.org, without a port"
                )

    def largest_picture(self, downscale: int) -> PictureSize:
        """The largest sides of a request, with a VAE that makes ``downscale`` pixels of a latent's.

        Raises:
            ConfigError: latents cannot fill them.
        """
        return self.former_sides.in_pixels(self, downscale, default=_MAX_SIDE, former_default=128)

    def check_defaults(self, downscale: int | None = None) -> None:
        """Refuse defaults that the limits forbid: a request that says nothing would fail.

        Args:
            downscale: pixels of a latent's side, where the VAE is known. Without it sizes are
                compared as far as they are in pixels.

        Raises:
            ConfigError: it names both.
        """
        if self.default_steps > self.max_steps:
            raise ConfigError(
                f"serve.default_steps {self.default_steps} is over serve.max_steps "
                f"{self.max_steps}: lower the one or raise the other"
            )
        in_latents = self.max_height is not None or self.max_width is not None
        largest = self.max_size or _MAX_SIDE
        if not in_latents and self.default_size > min(parse_size(largest)):
            raise ConfigError(
                f"serve.default_size {self.default_size} is over serve.max_size {largest}: lower "
                "the one or raise the other"
            )
        if downscale is not None:
            most = min(self.largest_picture(downscale))
            try:
                check_side("serve.default_size", self.default_size, downscale, most)
            except InputError as error:
                raise ConfigError(str(error)) from error
