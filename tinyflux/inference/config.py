"""What an engine can be asked for."""

from dataclasses import dataclass
from typing import NamedTuple


class PixelLimits(NamedTuple):
    """The sizes of pictures, in pixels: both sides are multiples of ``step``, a token's side."""

    step: int
    max_height: int
    max_width: int


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_steps: The most denoising steps of a request.
        max_height: The largest height of a request, in pixels.
        max_width: The largest width of a request, in pixels.
        max_prompt_chars: The longest prompt, in characters.
        max_batch: Pictures of one forward; one with guidance takes two of its rows.
        max_queue: Requests that may wait beside ``max_batch`` that are drawn.
        prompt_cache: Number of encoded prompts that are kept.
    """

    max_steps: int = 100
    max_height: int = 1024
    max_width: int = 1024
    max_prompt_chars: int = 1000
    max_batch: int = 8
    max_queue: int = 64
    prompt_cache: int = 256
