"""Timestep sampling, loss weight warm-up and learning rates."""

import math

import torch
from torch import Tensor

from tinyflux.errors import ConfigError

# The API has these here.
from tinyflux.model.time_shift import flux_shift as flux_shift
from tinyflux.model.time_shift import flux_unshift as flux_unshift
from tinyflux.trainer.config import TrainerConfig


def sample_timesteps(
    batch_size: int,
    device: str | torch.device = "cuda",
    shift: float = 3.0,
    min_t: float = 1e-4,
    max_t: float = 1 - 1e-4,
    logit_normal: bool = True,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random training times ``[batch_size]`` in ``[min_t, max_t]``.

    Drawn on the CPU, so that a generator's seed means the same on every device.
    """
    normal = torch.randn(batch_size, generator=generator)
    t = timesteps_from_normal(normal, shift, min_t, max_t, logit_normal, logit_mean, logit_std)
    return t.to(device, dtype)


def timesteps_from_normal(
    normal: Tensor,
    shift: float = 3.0,
    min_t: float = 1e-4,
    max_t: float = 1 - 1e-4,
    logit_normal: bool = True,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """Standard normal draws ``[B]`` as training times ``[B]``.

    Logit-normal (Esser et al. 2024, arXiv:2403.03206) is ``sigmoid(mean + std * z)``; otherwise
    times are uniform, ``Phi(z)``. Either is then shifted and clamped.
    """
    if logit_normal:
        t = torch.sigmoid(logit_mean + logit_std * normal)
    else:
        t = torch.special.ndtr(normal)
    return flux_shift(t, shift).clamp(min_t, max_t)


def get_lune_weight(step: int, warmup_steps: int, target_weight: float) -> float:
    """Weight of the Lune loss: linear from 0 to ``target_weight`` over ``warmup_steps``."""
    return _ramp(step, warmup_steps) * target_weight


def get_sol_weight(step: int, warmup_steps: int, target_weight: float) -> float:
    """Weight of the Sol loss: linear from 0 to ``target_weight`` over ``warmup_steps``."""
    return _ramp(step, warmup_steps) * target_weight


def cosine_schedule(
    step: int,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    warmup_type: str = "linear",
) -> float:
    """Factor of the base rate: warm-up, then half a cosine from 1 to ``min_lr_ratio``."""
    if step < warmup_steps:
        return warmup(step, warmup_steps, warmup_type)
    falling = 0.5 * (1 + math.cos(math.pi * _decay_progress(step, total_steps, warmup_steps)))
    return min_lr_ratio + (1 - min_lr_ratio) * falling


def linear_decay(
    step: int,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    warmup_type: str = "linear",
) -> float:
    """Factor of the base rate: warm-up, then a line from 1 to ``min_lr_ratio``."""
    if step < warmup_steps:
        return warmup(step, warmup_steps, warmup_type)
    return 1 - (1 - min_lr_ratio) * _decay_progress(step, total_steps, warmup_steps)


def constant_with_warmup(step: int, warmup_steps: int, warmup_type: str = "linear") -> float:
    """Factor of the base rate: warm-up, then 1."""
    return warmup(step, warmup_steps, warmup_type)


def warmup_stable_decay(
    step: int,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_ratio: float,
    warmup_type: str = "linear",
) -> float:
    """Factor of the base rate: warm-up, then 1, then the fall of the last steps.

    The stable part knows nothing of the run's length, so a run may be made longer from any
    checkpoint before the fall (MiniCPM, Hu et al. 2024, arXiv:2404.06395). The fall is
    ``1 - sqrt(progress)``, the best of the shapes that Haegele et al. 2024 (arXiv:2405.18392)
    compared.

    Args:
        decay_ratio: share of ``total_steps`` in which it falls; the warm-up goes first.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, warmup_type)
    first = max(warmup_steps, total_steps - round(decay_ratio * total_steps))
    return 1 - (1 - min_lr_ratio) * math.sqrt(_decay_progress(step, total_steps, first))


def lr_at(config: TrainerConfig, step: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    Schedules are read one step ahead: the first step of a warm-up already moves the weights.
    """
    step += 1
    floor = min(1.0, config.min_lr / config.learning_rate)
    if config.lr_scheduler == "constant":
        factor = constant_with_warmup(step, config.warmup_steps, config.warmup_type)
    elif config.lr_scheduler == "wsd":
        factor = warmup_stable_decay(
            step,
            config.total_steps,
            config.warmup_steps,
            floor,
            config.lr_decay_ratio,
            config.warmup_type,
        )
    else:
        schedule = cosine_schedule if config.lr_scheduler == "cosine" else linear_decay
        factor = schedule(step, config.total_steps, config.warmup_steps, floor, config.warmup_type)
    return config.learning_rate * factor


def warmup(step: int, warmup_steps: int, warmup_type: str = "linear") -> float:
    """Rise from 0 at step 0 to 1 at ``warmup_steps``, along a line or half a cosine."""
    ramp = _ramp(step, warmup_steps)
    if warmup_type == "linear":
        return ramp
    if warmup_type == "cosine":
        return 0.5 * (1 - math.cos(math.pi * ramp))
    raise ConfigError(f"unknown warmup_type '{warmup_type}': choose linear or cosine")


def _ramp(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def _decay_progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """How much of what follows the warm-up is over, in [0, 1]."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
