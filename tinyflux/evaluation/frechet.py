"""The Frechet distance between Gaussians fitted to features, FID."""

import torch
from torch import Tensor

from tinyflux.evaluation.estimate import Estimate, check_features


def fid(drawn: Tensor, real: Tensor) -> Estimate:
    """Frechet inception distance (Heusel et al., arXiv 1706.08500).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of means and covariances. It shrinks as pictures
    are added, so it is comparable only at equal numbers of them, and it has no interval.

    Args:
        drawn: ``[N, D]`` features.
        real: ``[M, D]`` features.
    """
    check_features(drawn, real, least=2)
    x, y = drawn.double(), real.double()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    one, other = torch.cov(x.T), torch.cov(y.T)
    trace = one.trace() + other.trace() - 2 * _trace_of_root(one, other)
    note, width = "", x.shape[1]
    if (fewest := min(len(x), len(y))) <= width:
        note = (
            f"{fewest} pictures are too few for the covariance of {width} features: this FID is "
            "far too high, and comparable with others of as many pictures only; read KID instead"
        )
    return Estimate((shift + trace).item(), count=len(x), note=note)


def _trace_of_root(one: Tensor, other: Tensor) -> Tensor:
    """``tr((A B)^(1/2))`` of symmetric matrices that are not negative.

    ``A B`` has the eigenvalues of the symmetric ``A^(1/2) B A^(1/2)``, which needs no general
    matrix root.
    """
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    squares: Tensor = torch.linalg.eigvalsh(root @ other @ root)
    return squares.clamp(min=0).sqrt().sum()
