"""What an engine can be asked for."""

from dataclasses import dataclass
from typing import NamedTuple

from tinyflux.errors import InputError
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.sampler import check_request
from tinyflux.inference.solvers import check_solver
from tinyflux.util.picture_size import check_side


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

    def check(self, request: SampleRequest, limits: PixelLimits) -> None:
        """Refuse what is out of bounds.

        Raises:
            InputError: it says what, and what may be asked for.
        """
        self._check_text(request)
        if not 1 <= request.num_steps <= self.max_steps:
            raise InputError(
                f"num_steps must be from 1 to {self.max_steps}, not {request.num_steps}"
            )
        step = limits.step
        check_side("height", request.height, step, limits.max_height)
        check_side("width", request.width, step, limits.max_width)
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

    def _check_text(self, request: SampleRequest) -> None:
        if not request.prompt.strip():
            raise InputError("prompt is empty: say what the picture should show")
        for name, text in (
            ("prompt", request.prompt),
            ("negative_prompt", request.negative_prompt),
        ):
            if len(text) > self.max_prompt_chars:
                raise InputError(
                    f"{name} has {len(text)} characters, the limit is {self.max_prompt_chars}"
                )
