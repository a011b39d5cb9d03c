"""Teacher features are cached at a few student times and read at any."""

import torch
from torch import Tensor

from tinyflux.errors import InputError


def default_buckets(device: torch.device | None = None) -> Tensor:
    """The ten student times ``[10]`` at which teachers run: 0.05, 0.15, ..., 0.95."""
    return torch.linspace(0.05, 0.95, 10, device=device)


def interpolate_buckets(features: Tensor, t_buckets: Tensor, t: Tensor) -> Tensor:
    """Features at times ``t``: linear between buckets, clamped outside.

    Args:
        features: ``[B, K, ...]``, one feature per bucket.
        t_buckets: ``[K]`` increasing student times.
        t: ``[B]`` student times.

    Returns:
        ``[B, ...]`` in the dtype of ``features``.
    """
    if features.shape[1] != t_buckets.shape[0] or features.shape[0] != t.shape[0]:
        raise InputError(
            f"features of shape {tuple(features.shape)} do not fit {t_buckets.shape[0]} buckets "
            f"and {t.shape[0]} times: they must be [B, K, ...] with t_buckets [K] and t [B]"
        )
    if t_buckets.shape[0] == 1:
        return features[:, 0]
    buckets = t_buckets.to(t.device, torch.float32)
    t = t.float().clamp(buckets[0], buckets[-1])
    upper = torch.searchsorted(buckets, t, right=True).clamp(1, buckets.shape[0] - 1)
    lower = upper - 1
    weight = (t - buckets[lower]) / (buckets[upper] - buckets[lower])
    rows = torch.arange(features.shape[0], device=features.device)
    weight = weight.to(features.device).reshape(-1, *(1,) * (features.ndim - 2))
    below = features[rows, lower.to(features.device)].float()
    above = features[rows, upper.to(features.device)].float()
    return torch.lerp(below, above, weight).to(features.dtype)
