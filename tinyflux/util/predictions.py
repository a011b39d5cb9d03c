"""Flow, v- and epsilon-prediction algebra.

Rectified flow (Liu et al. 2022, arXiv:2209.03003) in this project's direction: ``t = 0`` is noise,
``t = 1`` is data. The v and epsilon forms (Salimans & Ho 2022, arXiv:2202.00512; Ho et al. 2020,
arXiv:2006.11239) take the cumulative signal level ``alpha`` in [0, 1]:
``x_t = sqrt(alpha) * data + sqrt(1 - alpha) * noise``.

``t`` and ``alpha`` are scalars or ``[B]`` tensors; every other tensor is ``[B, ...]``.
"""

import torch
from torch import Tensor


def _expand(level: Tensor | float, like: Tensor) -> Tensor:
    """``[B]`` -> ``[B, 1, ...]``, so that one level per sample broadcasts over ``like``."""
    level = torch.as_tensor(level, dtype=like.dtype, device=like.device)
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))


def flow_x_t(data: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """``x_t = (1 - t) * noise + t * data``."""
    t = _expand(t, data)
    return (1 - t) * noise + t * data


def flow_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """``v = data - noise``, the derivative of ``x_t`` by ``t``."""
    return data - noise


def flow_data_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """``data = x_t + (1 - t) * v``."""
    return x_t + (1 - _expand(t, x_t)) * v


def flow_noise_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """``noise = x_t - t * v``."""
    return x_t - _expand(t, x_t) * v


def vpred_x_t(data: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """``x_t = sqrt(alpha) * data + sqrt(1 - alpha) * noise``."""
    alpha = _expand(alpha, data)
    return alpha.sqrt() * data + (1 - alpha).sqrt() * noise


def vpred_velocity(data: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """``v = sqrt(alpha) * noise - sqrt(1 - alpha) * data``."""
    alpha = _expand(alpha, data)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * data


def vpred_data_from_velocity(x_t: Tensor, v: Tensor, alpha: Tensor | float) -> Tensor:
    """``data = sqrt(alpha) * x_t - sqrt(1 - alpha) * v``."""
    alpha = _expand(alpha, x_t)
    return alpha.sqrt() * x_t - (1 - alpha).sqrt() * v


def eps_x_t(data: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """The noising of epsilon-prediction, which is that of v-prediction."""
    return vpred_x_t(data, noise, alpha)


def eps_target(noise: Tensor) -> Tensor:
    """Epsilon-prediction's target is the noise itself."""
    return noise


def eps_data_from_noise(x_t: Tensor, eps: Tensor, alpha: Tensor | float) -> Tensor:
    """``data = (x_t - sqrt(1 - alpha) * eps) / sqrt(alpha)``; ``alpha`` must be above 0."""
    alpha = _expand(alpha, x_t)
    return (x_t - (1 - alpha).sqrt() * eps) / alpha.sqrt()


def eps_to_vpred(eps: Tensor, x_t: Tensor, alpha: Tensor | float) -> Tensor:
    """``v = (eps - sqrt(1 - alpha) * x_t) / sqrt(alpha)``; ``alpha`` must be above 0."""
    alpha = _expand(alpha, x_t)
    return (eps - (1 - alpha).sqrt() * x_t) / alpha.sqrt()


def vpred_to_eps(v: Tensor, x_t: Tensor, alpha: Tensor | float) -> Tensor:
    """``eps = sqrt(alpha) * v + sqrt(1 - alpha) * x_t``."""
    alpha = _expand(alpha, x_t)
    return alpha.sqrt() * v + (1 - alpha).sqrt() * x_t
