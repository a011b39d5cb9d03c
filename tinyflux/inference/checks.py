"""What can be sampled at all, and what of it an engine draws."""

from collections.abc import Sequence

from tinyflux.errors import InputError
from tinyflux.inference.config import EngineConfig, PixelLimits
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.solvers import check_solver
from tinyflux.util.limits import MAX_SIDE, MAX_STEPS
from tinyflux.util.picture_size import check_side

MAX_SEED = 2**63 - 1


def check_sampling(
    height: int, width: int, num_steps: int, guidance_scale: float, seeds: Sequence[int] = ()
) -> None:
    """Refuse what cannot be sampled with an :class:`InputError` that says why."""
    for name, value, limit in (
        ("height", height, MAX_SIDE),
        ("width", width, MAX_SIDE),
        ("num_steps", num_steps, MAX_STEPS),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 1 <= value <= limit:
            raise InputError(f"{name} must be a whole number from 1 to {limit}, not {value!r}")
    if not 0 <= guidance_scale <= 100:
        raise InputError(f"guidance_scale must be from 0 to 100, not {guidance_scale!r}")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"a seed must be from 0 to {MAX_SEED}, not {seed!r}")


def check_request(request: SampleRequest, config: EngineConfig, limits: PixelLimits) -> None:
    """Refuse what is out of an engine's bounds.

    Raises:
        InputError: it says what, and what may be asked for.
    """
    _check_text(request, config.max_prompt_chars)
    if not 1 <= request.num_steps <= config.max_steps:
        raise InputError(f"num_steps must be from 1 to {config.max_steps}, not {request.num_steps}")
    step = limits.step
    check_side("height", request.height, step, limits.max_height)
    check_side("width", request.width, step, limits.max_width)
    if request.preview_every < 0:
        raise InputError(f"preview_every must be 0 or more, not {request.preview_every}")
    check_solver(request.solver)
    check_sampling(
        request.height // step,
        request.width // step,
        request.num_steps,
        request.guidance_scale,
        [request.seed],
    )


def check_adapter(request: SampleRequest, known: Sequence[str]) -> None:
    """Refuse an adapter that an engine does not have, with an :class:`InputError`."""
    if request.adapter is not None and request.adapter not in known:
        raise InputError(
            f"there is no adapter '{request.adapter:.60}': "
            f"{', '.join(known) if known else 'none is served'}"
        )


def _check_text(request: SampleRequest, most: int) -> None:
    if not request.prompt.strip():
        raise InputError("prompt is empty: say what the picture should show")
    for name, text in (
        ("prompt", request.prompt),
        ("negative_prompt", request.negative_prompt),
    ):
        if len(text) > most:
            raise InputError(f"{name} has {len(text)} characters, the limit is {most}")
