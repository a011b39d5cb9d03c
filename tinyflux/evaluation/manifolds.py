"""Fidelity and variety by nearest neighbours: precision, recall, density and coverage."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.evaluation.estimate import Estimate, check_features, share_estimate

PR_NEIGHBOURS, DC_NEIGHBOURS = 3, 5
BLOCK = 1024  # rows of a distance matrix at once


@dataclass(frozen=True)
class Manifolds:
    """How drawn and real pictures lie in each other's balls.

    A set's balls reach from each of its pictures to its k-th nearest other one.

    Attributes:
        precision: Share of drawn pictures in a ball of the real ones: are they good?
        recall: Share of real pictures in a ball of the drawn ones: is all of it drawn?
        density: Balls of real pictures that a drawn one is in, over k; above 1 where drawn pictures
            crowd where real ones do. Unlike precision, an outlier's large ball counts little.
        coverage: Share of real pictures whose ball holds a drawn one.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifolds(
    drawn: Tensor,
    real: Tensor,
    pr_neighbours: int = PR_NEIGHBOURS,
    dc_neighbours: int = DC_NEIGHBOURS,
) -> Manifolds:
    """Improved precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    Their Wilson intervals are over the pictures that are counted and take the balls as given.

    Args:
        drawn: ``[N, D]`` features.
        real: ``[M, D]`` features.
        pr_neighbours: k of precision and recall.
        dc_neighbours: k of density and coverage.
    """
    check_features(drawn, real, least=max(pr_neighbours, dc_neighbours) + 1)
    x, y = drawn.double(), real.double()
    x_radii = _radii(x, pr_neighbours)
    y_pr_radii, y_dc_radii = _radii(y, pr_neighbours), _radii(y, dc_neighbours)
    in_real = torch.zeros(len(x), dtype=torch.bool)
    balls = 0
    in_drawn = torch.zeros(len(y), dtype=torch.bool)
    holds_drawn = torch.zeros(len(y), dtype=torch.bool)
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        distances = torch.cdist(x[part], y)
        in_real[part] = (distances <= y_pr_radii).any(1)
        balls += int((distances <= y_dc_radii).sum())
        in_drawn |= (distances <= x_radii[part, None]).any(0)
        holds_drawn |= (distances <= y_dc_radii).any(0)
    return Manifolds(
        precision=share_estimate(in_real),
        recall=share_estimate(in_drawn),
        density=Estimate(balls / (dc_neighbours * len(x)), count=len(x)),
        coverage=share_estimate(holds_drawn),
    )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """``[N]``: each picture's distance to its k-th nearest other one."""
    parts = [
        # A picture is the nearest to itself.
        torch.cdist(part, features).kthvalue(neighbours + 1).values
        for part in features.split(BLOCK)
    ]
    return torch.cat(parts)
