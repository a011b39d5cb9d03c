"""Power-function averages of a model's weights, of lengths that are chosen after the run.

After Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv:2312.02696), section 3: an average whose memory is a share of the run so far, and averages of
other lengths as mixtures of the ones that were kept.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tinyflux.errors import CheckpointError
from tinyflux.model.weights import check_tensors
from tinyflux.trainer.ema import EMA


@cache
def exponent(length: float) -> float:
    """The exponent ``g`` of the power function whose relative width is ``length``.

    ``length = sqrt(g + 1) / ((g + 2) * sqrt(g + 3))`` (the paper's equation 6, "sigma_rel") is the
    standard deviation of the profile ``(g + 1) * tau^g / t^(g + 1)`` on ``[0, t]``, over ``t``.
    It falls from ``sqrt(1 / 12)`` at 0, the plain mean, so it is solved by halving.
    """
    low, high = 0.0, 1.0
    while _width(high) > length:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _width(middle) > length else (low, middle)
    return (low + high) / 2


def _width(g: float) -> float:
    return math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3))


def power_decay(length: float, step: int) -> float:
    """The decay of a power-function average in step ``step``, counted from 1.

    ``(1 - 1 / step) ** (g + 1)``, the paper's equation 5: it is 0 in the first step, so nothing
    of the weights before it is left.
    """
    decay: float = (1 - 1 / step) ** (exponent(length) + 1)
    return decay


@dataclass(frozen=True)
class Profile:
    """How much each step of a run counts in a power-function average.

    ``(g + 1) * tau^g / step^(g + 1)`` for ``tau`` in ``[0, step]``, with ``g`` of ``length``.
    """

    length: float
    step: float

    def inner(self, other: "Profile") -> float:
        """The integral of the product of two profiles (the paper's algorithm 3)."""
        a, b = exponent(self.length), exponent(other.length)
        until = min(self.step, other.step)
        ratios: float = (until / self.step) ** a * (until / other.step) ** b
        return (a + 1) * (b + 1) / (a + b + 1) * ratios * until / (self.step * other.step)


@dataclass(frozen=True)
class Mixture:
    """An average as a sum of others.

    Attributes:
        weights: one for each of the others; they add up to 1.
        error: the distance of the mixed profile from the one that is wanted, over the norm of that.
    """

    weights: list[float]
    error: float


def mixture(kept: Sequence[Profile], wanted: Profile) -> Mixture:
    """The mixture of the profiles ``kept`` that is nearest to ``wanted``, by least squares.

    The paper's section 3.2, with one condition more: the weights add up to 1, so that parameters
    that do not change stay what they are.
    """
    count = len(kept)
    products = torch.tensor([[a.inner(b) for b in kept] for a in kept], dtype=torch.float64)
    onto = torch.tensor([a.inner(wanted) for a in kept], dtype=torch.float64)
    norm = wanted.inner(wanted)
    # Lagrange's multiplier of the condition is the last unknown. Scaled, for lstsq's cutoff.
    system = torch.ones(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = products / norm
    system[count, count] = 0
    right = torch.cat([onto / norm, torch.ones(1, dtype=torch.float64)])
    solved = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
    weights = solved[:count] / solved[:count].sum()
    rest = 1 - 2 * weights @ onto / norm + weights @ products @ weights / norm
    return Mixture(weights.tolist(), math.sqrt(max(0.0, float(rest))))


class PowerEMA:
    """Power-function averages of some lengths, beside each other and like :class:`EMA`.

    Attributes:
        tracks: the averages by length; empty where a run keeps none.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], lengths: Iterable[float]):
        self.tracks = {length: EMA(model) for length in lengths}

    def update(self, model: nn.Module | Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after optimizer step ``step``, counted from 1."""
        for length, track in self.tracks.items():
            track.update(model, power_decay(length, step))

    def check(self, kept: Iterable[float], where: str) -> None:
        """Refuse to go on from averages of the lengths ``kept`` if one is missing; CheckpointError.

        One that began later would be of no known profile.
        """
        if missing := sorted(set(self.tracks) - set(kept)):
            raise CheckpointError(
                f"{where} keeps no power-function EMA of length {missing[0]:g}, which reaches from "
                "a run's first step: set trainer.ema_lengths as the run began, or begin a new one"
            )

    @torch.no_grad()
    def load(self, shadows: Mapping[float, Mapping[str, Tensor]], where: str) -> None:
        """Take over a checkpoint's averages, or a worker's parts of them, by length.

        Raises:
            CheckpointError: one is missing or does not fit.
        """
        self.check(shadows, where)
        for length, track in self.tracks.items():
            check_tensors(track.shadow, shadows[length], where)
            track.load_state_dict({"decay": track.decay, "shadow": dict(shadows[length])})
