"""The optimizer's loop that the toy world's models are trained with."""

import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A stage's figures; those of quality are by split.
Figures = dict[str, float | dict[str, float]]


def _cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 2%."""
    return min(1.0, (step + 1) / warmup) * (
        0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
    )


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    lr: float,
    figure: Callable[[], str],
) -> float:
    """Run AdamW for ``steps``; logs progress with ``figure`` and returns seconds taken."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _cosine(step, steps)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            logger.info("%s %d/%d, %.0f s, %s", name, step + 1, steps, seconds, figure())
    return time.monotonic() - started
