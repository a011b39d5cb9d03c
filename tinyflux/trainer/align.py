"""Losses of a student's image tokens against features of the clean picture, place by place.

Shape legend: B samples, h x w the grid of image tokens, N = h * w, C channels of the features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyflux.data.batches import TrainBatch
from tinyflux.model.packing import pack_latents, unpack_latents
from tinyflux.trainer.align_config import AlignConfig
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.draws import Conditions
from tinyflux.trainer.losses import masked_mean

# Pairs of places grow with the square of their number: finer grids are averaged down to this side.
RELATIONS_SIDE = 16


@dataclass
class Target:
    """What the tokens of a micro-batch are held against.

    Attributes:
        is_on: whether this step has its loss.
        features: ``[B, N, C]``.
        mask: ``[B]`` bool, the samples that have this loss.
    """

    config: AlignConfig
    is_on: bool
    features: Tensor
    mask: Tensor


@dataclass
class Alignment:
    """The targets of a micro-batch; none in a run without ``trainer.align``."""

    grid: tuple[int, int]
    targets: list[Target] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        batch: TrainBatch,
        config: TrainerConfig,
        step: int,
        conditions: Conditions,
        grid: tuple[int, int],
    ) -> "Alignment":
        """Those of ``batch`` in optimizer step ``step``, on ``grid`` tokens."""
        alignment = cls(grid)
        for target in config.align:
            features = pack_latents(batch.latents.float(), batch.grid[0] // grid[0])
            low, high = target.t_range
            mask = (conditions.t >= low) & (conditions.t <= high)
            if target.shuffle and conditions.others is not None:
                others = conditions.others
                features = features[others]
                # A sample that is alone in its micro-batch has no other.
                mask = mask & (others != torch.arange(len(batch), device=others.device))
            is_on = target.is_on(step, config.total_steps)
            alignment.targets.append(Target(target, is_on, features, mask))
        return alignment

    def arguments(self) -> dict[str, Any]:
        """What an :class:`~tinyflux.trainer.projectors.AlignedStudent`'s forward is asked for."""
        if not self.targets:
            return {}
        return {"aligned": [target.config.name for target in self.targets if target.is_on]}

    def losses(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The unweighted loss of each target, a scalar, 0 where it is not on.

        Args:
            outputs: that forward's, with the projected tokens by the targets' names.
        """
        return [self._loss(target, outputs[target.config.name]) for target in self.targets]

    def _loss(self, target: Target, projected: Tensor) -> Tensor:
        if not target.is_on:
            return projected.float().sum()  # of no samples, so that gradients are zeros
        return align_loss(
            projected, target.features, target.config.loss, self.grid, mask=target.mask
        )

    def weighted(self, losses: list[Tensor]) -> list[Tensor]:
        """The losses as they are minimised."""
        pairs = zip(self.targets, losses, strict=True)
        return [target.config.weight * loss for target, loss in pairs]


def align_loss(
    projected: Tensor,
    features: Tensor,
    kind: str,
    grid: tuple[int, int],
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over the samples of their tokens' distance from features, a scalar in fp32.

    Args:
        projected: ``[B, N, C]`` on ``grid``. features: ``[B, N, C]``, for ``"relations"`` of any C.
        kind: ``"cosine"`` (1 - cosine similarity), ``"smooth_l1"`` (linear beyond 1), or
            ``"relations"``: the squared difference of :func:`similarities`.
        mask: ``[B]`` bool, the samples that have features; others count as a loss of 0.
    """
    projected, features = projected.float(), features.float()
    if mask is not None:
        # Something finite where there is none, for the gradient's sake.
        features = torch.where(mask[:, None, None], features, 0.0)
    if kind == "cosine":
        per_sample = 1 - F.cosine_similarity(projected, features, dim=-1).mean(-1)
    elif kind == "smooth_l1":
        per_sample = F.smooth_l1_loss(projected, features, reduction="none").mean((-2, -1))
    else:
        apart = similarities(projected, grid) - similarities(features, grid)
        per_sample = apart.square().mean((-2, -1))
    return masked_mean(per_sample, mask)


def similarities(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines ``[B, n, n]`` between all pairs of places of ``[B, N, C]`` tokens.

    A side of the ``grid`` above :data:`RELATIONS_SIDE` is averaged down to it.
    """
    coarse = min(grid[0], RELATIONS_SIDE), min(grid[1], RELATIONS_SIDE)
    if coarse != grid:
        tokens = pack_latents(F.adaptive_avg_pool2d(unpack_latents(tokens, *grid), coarse))
    directions = F.normalize(tokens, dim=-1)
    return directions @ directions.transpose(1, 2)
