"""The shift of times, by which larger pictures see more noise."""

import math

from torch import Tensor


def flux_shift(t: Tensor, shift: float = 3.0) -> Tensor:
    """Flux timestep shift ``t' = s * t / (1 + (s - 1) * t)``.

    FLUX and SD3 apply it to the noise level. Here it is applied to the time ``t``, which is 1 at
    the data: above 1 it moves times towards the data and away from noise. A shift of the noise
    level by s is one of the time by 1/s, ``1 - flux_shift(1 - t, s) == flux_shift(t, 1 / s)``:
    FLUX's 3 is 1/3 here.
    """
    return shift * t / (1 + (shift - 1) * t)


def shift_at(shift: float, tokens: int, shift_tokens: int | None) -> float:
    """The shift for pictures of ``tokens`` latents when ``shift`` is that of ``shift_tokens``.

    At the same time a larger picture has lost less, since neighbours tell of each other (Esser et
    al. 2024, arXiv:2403.03206, eq. 23), so it is trained and drawn at times with more noise: the
    noise level's shift is multiplied by ``sqrt(tokens / shift_tokens)``. The time's shift is the
    inverse of the noise level's (see :func:`flux_shift`), so here it is divided by that. None keeps
    one shift for all sizes.
    """
    return shift if shift_tokens is None else shift * math.sqrt(shift_tokens / tokens)


def flux_unshift(t: Tensor, shift: float = 3.0) -> Tensor:
    """Inverse of :func:`flux_shift`: ``t = t' / (s - (s - 1) * t')``."""
    return t / (shift - (shift - 1) * t)
