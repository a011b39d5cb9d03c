"""Loss functions.

Every loss is a mean over the batch of per-sample losses. A sample that a mask leaves out counts as
a loss of 0 and still as one of B: the gradient of a global batch is then the plain average over its
micro-batches and workers, however the samples that count fall among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyflux.errors import ConfigError, InputError
from tinyflux.trainer.config_checks import LUNE_MODES, SNR_KINDS


def huber_loss(pred: Tensor, target: Tensor, delta: float = 0.1) -> Tensor:
    """Huber loss of each element: quadratic up to ``delta``, linear with slope ``delta`` beyond.

    What minimises it lies between the mean (``delta`` above all distances) and the median (below
    them). A flow's velocity is a mean, and its residuals are near 1: with a ``delta`` of 0.1 a
    median is learned, which is another flow. Plain MSE learns the mean.

    Returns:
        The shape of ``pred``: ``0.5 * q^2 + delta * (|d| - q)`` with ``q = min(|d|, delta)``.
    """
    distance = (pred - target).abs()
    quadratic = distance.clamp(max=delta)
    return 0.5 * quadratic.square() + delta * (distance - quadratic)


def min_snr_weight(t: Tensor, gamma: float = 5.0, kind: str = "epsilon") -> Tensor:
    """Min-SNR weights with ``snr = (t / (1 - t))^2`` (Hang et al. 2023, arXiv:2303.09556).

    They weigh the squared error of the data by ``min(snr, gamma)``. What that is for the squared
    error of another prediction is its ``kind``:

    - ``"epsilon"``, of the noise: ``min(snr, gamma) / snr``, which is 1 for noisy samples and small
      near the data. Put on a velocity's error, as by default, it is no min-SNR weight, but a
      preference for noisy times.
    - ``"velocity"``, of ``data - noise``: ``min(snr, gamma) * (1 - t)^2``, which is 0 at both ends
      and largest where ``snr`` is ``gamma``.

    Args:
        t: ``[B]`` times, 0 is noise.

    Returns:
        ``[B]`` in [0, 1].
    """
    t = t.float()
    snr = (t / (1 - t).clamp(min=1e-6)).square().clamp(min=1e-12)
    if kind == "epsilon":
        return snr.clamp(max=gamma) / snr
    if kind == "velocity":
        # As t^2 below gamma, which is exact where snr is not.
        return torch.minimum(t.square(), gamma * (1 - t).square())
    raise ConfigError(f"unknown min-SNR kind '{kind}': choose one of {', '.join(SNR_KINDS)}")


def compute_main_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    spatial_weights: Tensor | None = None,
    use_huber: bool = True,
    huber_delta: float = 0.1,
    fg_weight: float = 2.0,
    bg_weight: float = 0.5,
    snr_weights: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Velocity loss, a scalar in fp32.

    Args:
        pred, target: ``[B, N, C]``.
        mask: ``[B, H, W]``, 1 where the foreground is: tokens weigh ``fg_weight`` there and
            ``bg_weight`` elsewhere.
        spatial_weights: ``[B, s, s]`` importance, resized to the grid and scaled to mean 1.
        snr_weights: ``[B]`` factor of each sample.
        grid: ``(h, w)`` of the tokens; left out it is the mask's, or square.
    """
    pred, target = pred.float(), target.float()
    loss = huber_loss(pred, target, huber_delta) if use_huber else (pred - target).square()
    loss = loss.mean(-1)  # [B, N]
    if mask is not None or spatial_weights is not None:
        height, width = _grid(loss.shape[1], grid, mask)
        if spatial_weights is not None:
            loss = loss * _token_weights(spatial_weights, height, width)
        if mask is not None:
            foreground = _resize(mask, height, width)
            loss = loss * (bg_weight + (fg_weight - bg_weight) * foreground)
    per_sample = loss.mean(-1)
    if snr_weights is not None:
        per_sample = per_sample * snr_weights
    return per_sample.mean()


def _grid(tokens: int, grid: tuple[int, int] | None, mask: Tensor | None) -> tuple[int, int]:
    """The token grid ``(h, w)``."""
    if grid is None and mask is not None and mask.shape[1] * mask.shape[2] == tokens:
        grid = (mask.shape[1], mask.shape[2])
    if grid is None:
        side = round(tokens**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != tokens:
        raise InputError(
            f"{tokens} tokens do not fill a {grid[0]} x {grid[1]} grid: pass grid=(h, w)"
        )
    return grid


def _resize(maps: Tensor, height: int, width: int) -> Tensor:
    """``[B, s, s]`` to ``[B, height * width]``, bilinear."""
    maps = maps.float()
    if maps.shape[1:] != (height, width):
        maps = F.interpolate(maps[:, None], (height, width), mode="bilinear")[:, 0]
    return maps.flatten(1)


def _token_weights(spatial: Tensor, height: int, width: int) -> Tensor:
    """Importance maps as weights ``[B, N]`` of mean 1; a map of zeros weighs evenly."""
    weights = _resize(spatial, height, width)
    mean = weights.mean(-1, keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp(min=1e-12), torch.ones_like(weights))


def compute_lune_loss(
    pred: Tensor, target: Tensor, mode: str = "cosine", mask: Tensor | None = None
) -> Tensor:
    """Distance of predicted to teacher's pooled features, a scalar in fp32.

    Args:
        pred, target: ``[B, D]``.
        mode: ``"cosine"`` (1 - cosine similarity), ``"mse"`` or ``"huber"`` (delta 0.1).
        mask: ``[B]`` bool, the samples that have a teacher's feature.
    """
    pred = pred.float()
    target = _present(target.float(), pred, mask)
    if mode == "cosine":
        per_sample = 1 - F.cosine_similarity(pred, target, dim=-1)
    elif mode == "mse":
        per_sample = (pred - target).square().mean(-1)
    elif mode == "huber":
        per_sample = huber_loss(pred, target).mean(-1)
    else:
        raise ConfigError(f"unknown Lune loss '{mode}': choose one of {', '.join(LUNE_MODES)}")
    return masked_mean(per_sample, mask)


def compute_sol_loss(
    pred_stats: Tensor,
    pred_spatial: Tensor,
    target_stats: Tensor,
    target_spatial: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the statistics plus that of the map, a scalar in fp32.

    Args:
        pred_stats, target_stats: ``[B, S]``.
        pred_spatial, target_spatial: ``[B, s, s]``.
        mask: ``[B]`` bool, the samples that have a teacher's feature.
    """
    pred_stats, pred_spatial = pred_stats.float(), pred_spatial.float()
    target_stats = _present(target_stats.float(), pred_stats, mask)
    target_spatial = _present(target_spatial.float(), pred_spatial, mask)
    stats = (pred_stats - target_stats).square().mean(-1)
    spatial = (pred_spatial - target_spatial).square().mean((-2, -1))
    return masked_mean(stats + spatial, mask)


def _present(target: Tensor, pred: Tensor, mask: Tensor | None) -> Tensor:
    """Targets with something finite where there is none, for the gradient's sake."""
    if mask is None:
        return target
    return torch.where(mask.reshape(-1, *(1,) * (target.ndim - 1)), target, pred.detach())


def masked_mean(per_sample: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all samples ``[B]``, those outside the mask ``[B]`` counting as 0."""
    if mask is not None:
        per_sample = torch.where(mask, per_sample, 0.0)
    return per_sample.mean()
