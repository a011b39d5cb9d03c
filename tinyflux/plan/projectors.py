"""What ``trainer.align`` adds to a step: projectors, and the losses of what they give."""

import dataclasses
import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.packing import token_grid
from tinyflux.plan.work import StepWork, count_loss, factors
from tinyflux.trainer.align import align_loss
from tinyflux.trainer.align_config import AlignConfig, check_blocks
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.projectors import projector_of, target_channels


def add_projectors(
    work: StepWork,
    config: TinyFluxConfig,
    trainer: TrainerConfig,
    micro_batch: int,
    grid: tuple[int, int],
) -> StepWork:
    """The student's ``work`` with that of all targets, as if each had its loss until the end.

    Args:
        grid: height and width of the latents.

    Raises:
        ConfigError: a target is after a block that the student has not.
    """
    check_blocks(trainer.align, config.num_blocks)
    for target in trainer.align:
        work = _with_target(work, target, config, trainer.dtype, micro_batch, grid)
    return work


def _with_target(
    work: StepWork,
    target: AlignConfig,
    config: TinyFluxConfig,
    dtype: torch.dtype,
    micro_batch: int,
    grid: tuple[int, int],
) -> StepWork:
    tokens = token_grid(*grid, config.patch_size)
    with FakeTensorMode():
        projector = projector_of(target, config)
        hidden = torch.zeros(micro_batch, math.prod(tokens), config.hidden_size)
        hidden.requires_grad_()
        features = torch.zeros(
            micro_batch, math.prod(tokens), target_channels(target.group, config)
        )

        def loss() -> Tensor:
            projected = projector(hidden, tokens)
            with torch.autocast("cpu", enabled=False):
                return align_loss(projected, features, target.loss, tokens)

        flops, size = count_loss(loss, projector.parameters(), dtype)
        shapes = [parameter.shape for parameter in projector.parameters()]
    count = sum(shape.numel() for shape in shapes)
    return dataclasses.replace(
        work,
        parameters=work.parameters + count,
        trainable=work.trainable + count,
        factors=work.factors + sum(map(factors, shapes)),
        largest=max([work.largest, *(shape.numel() for shape in shapes)]),
        flops=work.flops + flops,
        activation_bytes=work.activation_bytes + size,
        projectors=work.projectors + count,
    )
