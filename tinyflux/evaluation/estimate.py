"""A figure with its interval, and the intervals that need nothing but counts or values."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.errors import InputError

Z95 = 1.959963984540054  # a normal variable is within this many deviations in 95% of the cases


@dataclass(frozen=True)
class Estimate:
    """A metric's value over a number of pictures.

    Attributes:
        value: The metric's value.
        low: The lower end of its 95% interval, or None where the metric has none.
        high: The upper end.
        count: Pictures that it was computed from.
        note: What to keep in mind when it is read, as a sentence; empty if there is nothing.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 0
    note: str = ""


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of ``[N]`` with its normal 95% interval, ``mean +- 1.96 * deviation / sqrt(N)``."""
    count = len(values)
    if count == 0:
        raise InputError("a mean needs at least one value")
    mean = values.double().mean().item()
    if count < 2:
        return Estimate(mean, count=count)
    half = Z95 * values.double().std().item() / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def share_estimate(hits: Tensor) -> Estimate:
    """The share of ``[N]`` that is true, with its Wilson 95% interval.

    Wilson's interval (1927) holds for few pictures and for shares near 0 and 1, where the normal
    one is empty.
    """
    count = len(hits)
    if count == 0:
        raise InputError("a share needs at least one picture")
    share = hits.double().mean().item()
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    spread = math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    half = Z95 * spread / (1 + Z95**2 / count)
    # At shares of 0 and 1 an end is the share itself, which rounding would miss.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return Estimate(share, low, high, count)


def check_features(drawn: Tensor, real: Tensor, least: int) -> None:
    """Refuse features that cannot be compared.

    Args:
        drawn: ``[N, D]``.
        real: ``[M, D]``.
        least: pictures that each needs.

    Raises:
        InputError: other shapes, too few pictures, or values that are no numbers.
    """
    for name, features in (("drawn", drawn), ("real", real)):
        if features.ndim != 2:
            raise InputError(f"features of {name} pictures must be [N, D], not {features.ndim}-d")
        if len(features) < least:
            raise InputError(
                f"this metric needs at least {least} {name} pictures, not {len(features)}"
            )
        if not torch.isfinite(features).all():
            raise InputError(f"the features of {name} pictures hold values that are not finite")
    if drawn.shape[1] != real.shape[1]:
        raise InputError(
            f"features of {drawn.shape[1]} and of {real.shape[1]} dimensions cannot be compared: "
            "take both from one extractor"
        )
