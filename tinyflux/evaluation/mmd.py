"""Kernel distances between pictures: KID and CMMD, with jackknife intervals.

Both are a maximum mean discrepancy, ``E k(x, x') + E k(y, y') - 2 E k(x, y)``. A kernel matrix is
seen in blocks and only its sums by row are kept, of which every leave-one-out value follows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.evaluation.estimate import Z95, Estimate, check_features

BLOCK = 1024  # rows of a kernel matrix at once
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]


def kid(drawn: Tensor, real: Tensor) -> Estimate:
    """Kernel inception distance (Binkowski et al., arXiv 1801.01401), unbiased.

    The squared discrepancy of the kernel ``(x . y / D + 1)^3`` over all pictures of both sets, so
    its expectation is 0 for sets of one distribution, at any size, and a value may be below 0. The
    95% interval is ``+- 1.96`` jackknife deviations, over the pictures of both sets; for sets of
    one distribution it is wider than need be.

    Args:
        drawn: ``[N, D]`` features.
        real: ``[M, D]`` features.
    """

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    return _estimate(drawn, real, kernel, unbiased=True, scale=1.0)


def cmmd(drawn: Tensor, real: Tensor) -> Estimate:
    """CLIP maximum mean discrepancy (Jayasumana et al., arXiv 2401.09603), as published.

    A Gaussian kernel of deviation 10 on CLIP embeddings of length 1, times 1,000, with the pairs of
    a picture with itself, so that it is above 0 even for sets of one distribution: compare it at
    equal numbers of pictures only.

    Args:
        drawn: ``[N, D]`` CLIP embeddings, of any length.
        real: ``[M, D]``.
    """

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, other).square() / (2 * CMMD_SIGMA**2))

    unit = [torch.nn.functional.normalize(part.double(), dim=1) for part in (drawn, real)]
    return _estimate(unit[0], unit[1], kernel, unbiased=False, scale=CMMD_SCALE)


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel matrix: by row, by column, and its diagonal."""

    rows: Tensor
    columns: Tensor
    diagonal: Tensor


def _estimate(
    drawn: Tensor, real: Tensor, kernel: Kernel, *, unbiased: bool, scale: float
) -> Estimate:
    check_features(drawn, real, least=3)
    x, y = drawn.double(), real.double()
    within_x, within_y, between = _sums(x, x, kernel), _sums(y, y, kernel), _sums(x, y, kernel)
    mean_x, mean_y = _mean(within_x, unbiased), _mean(within_y, unbiased)
    pairs = len(x) * len(y)
    value = mean_x + mean_y - 2 * between.rows.sum() / pairs
    # Without picture i of one set its own mean and the mean between both change.
    less_x = _means_without(within_x, unbiased) + mean_y
    less_x -= 2 * (between.rows.sum() - between.rows) / (pairs - len(y))
    less_y = _means_without(within_y, unbiased) + mean_x
    less_y -= 2 * (between.rows.sum() - between.columns) / (pairs - len(x))
    half = Z95 * math.sqrt(_jackknife_variance(less_x) + _jackknife_variance(less_y))
    centre = value.item()
    return Estimate(scale * centre, scale * (centre - half), scale * (centre + half), len(x))


def _sums(one: Tensor, other: Tensor, kernel: Kernel) -> _Sums:
    rows = torch.empty(len(one), dtype=torch.float64)
    columns = torch.zeros(len(other), dtype=torch.float64)
    diagonal = torch.zeros(min(len(one), len(other)), dtype=torch.float64)
    for start in range(0, len(one), BLOCK):
        values = kernel(one[start : start + BLOCK], other).cpu()
        rows[start : start + BLOCK] = values.sum(1)
        columns += values.sum(0)
        here = values.diagonal(offset=start) if start < len(other) else values[:0, 0]
        diagonal[start : start + len(here)] = here
    return _Sums(rows, columns, diagonal)


def _mean(sums: _Sums, unbiased: bool) -> Tensor:
    """The mean of a set's kernel matrix, without its diagonal if ``unbiased``."""
    count = len(sums.rows)
    if unbiased:
        return (sums.rows.sum() - sums.diagonal.sum()) / (count * (count - 1))
    return sums.rows.sum() / count**2


def _means_without(sums: _Sums, unbiased: bool) -> Tensor:
    """``[N]``: :func:`_mean` of the set without each of its pictures in turn."""
    left = len(sums.rows) - 1
    total = sums.rows.sum() - 2 * sums.rows + sums.diagonal
    if unbiased:
        return (total - sums.diagonal.sum() + sums.diagonal) / (left * (left - 1))
    return total / left**2


def _jackknife_variance(without: Tensor) -> float:
    """Tukey's variance of a statistic from its leave-one-out values ``[N]``."""
    count = len(without)
    return (count - 1) / count * (without - without.mean()).square().sum().item()
