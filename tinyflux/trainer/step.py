"""The one training step: a batch and a model in, losses out.

Every random number of a sample comes from (seed, its global position in the run). The same global
batch is therefore trained in the same way on any number of workers and micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tinyflux.data.batches import TrainBatch
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid
from tinyflux.trainer.align import Alignment
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.distillation import Teachers, distillation_losses, teacher_features
from tinyflux.trainer.draws import Conditions
from tinyflux.trainer.dropout import SampleDropout
from tinyflux.trainer.losses import compute_main_loss, min_snr_weight
from tinyflux.trainer.schedules import get_lune_weight, get_sol_weight
from tinyflux.util.predictions import flow_velocity, flow_x_t


class Velocity(Protocol):
    """A :class:`TinyFluxDeep`, or an engine's wrapped and autocast call of one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass
class StepLoss:
    """Losses of a micro-batch, fp32 scalars. Only ``total`` carries a gradient.

    Attributes:
        total: what is minimised: ``main`` plus the others with their weights.
        main: velocity. lune, sol: unweighted distillation, 0 where off.
        aligned: unweighted, of each of ``trainer.align``, 0 where off.
    """

    total: Tensor
    main: Tensor
    lune: Tensor
    sol: Tensor
    aligned: Sequence[Tensor] = ()

    def stack(self) -> Tensor:
        """``[4 + A]``, detached: total, main, lune, sol, and the A of ``aligned``."""
        return torch.stack([self.total.detach(), self.main, self.lune, self.sol, *self.aligned])


def training_loss(
    model: TinyFluxDeep,
    batch: TrainBatch,
    config: TrainerConfig,
    step: int,
    null_text: tuple[Tensor, Tensor] | None,
    t_buckets: Tensor,
    velocity: Velocity | None = None,
    conditions: Conditions | None = None,
) -> StepLoss:
    """Losses of one micro-batch at optimizer step ``step``.

    Args:
        model: the bare model, in training mode.
        null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, which stand in
            for dropped captions; None means zeros.
        t_buckets: ``[K]`` times of the batch's teacher features.
        velocity: how to call the model, if not directly: an engine's forward, which with
            ``config.align`` is that of an :class:`~tinyflux.trainer.projectors.AlignedStudent`.
        conditions: the batch's, on its device; left out, they are made here.
    """
    device = batch.latents.device
    if conditions is None:
        made = Conditions.of(batch, config, device)
        conditions = made.map(lambda tensor: tensor.to(device))
    t, noise = conditions.t, conditions.noise
    data = batch.latents.float()
    t5, pooled = _drop_text(batch, conditions.no_text, null_text)
    teachers = teacher_features(batch, model.config, config, t, t_buckets)
    _seed_dropout(model, conditions.dropout)

    patch = model.config.patch_size
    grid = token_grid(*batch.grid, patch)
    alignment = Alignment.of(batch, config, step, conditions, grid)
    pred, experts = (velocity or model)(
        pack_latents(flow_x_t(data, noise, t), patch),
        t5,
        pooled,
        t,
        TinyFluxDeep.create_img_ids(len(batch), *grid, device=device),
        **teachers.seen(conditions.keep_lune, conditions.keep_sol),
        return_expert_pred=True,
        grid=grid,
        **alignment.arguments(),
    )
    target = pack_latents(flow_velocity(data, noise), patch)
    main = _velocity_loss(pred, target, grid, t, batch, teachers, config)
    lune, sol = distillation_losses(experts, teachers, config, model.sol_units, t)
    aligned = alignment.losses(experts)
    total = sum(
        alignment.weighted(aligned),
        main
        + get_lune_weight(step, config.lune_warmup_steps, config.lune_weight) * lune
        + get_sol_weight(step, config.sol_warmup_steps, config.sol_weight) * sol,
    )
    return StepLoss(
        total, main.detach(), lune.detach(), sol.detach(), [loss.detach() for loss in aligned]
    )


def _drop_text(
    batch: TrainBatch, drop: Tensor, null_text: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Text embeddings with those of samples ``drop`` ``[B]`` replaced by the null caption's."""
    t5, pooled = batch.t5_embeds.float(), batch.clip_pooled.float()
    null_t5, null_pooled = null_text or (t5.new_zeros(()), pooled.new_zeros(()))
    return (
        torch.where(drop[:, None, None], null_t5.to(t5), t5),
        torch.where(drop[:, None], null_pooled.to(pooled), pooled),
    )


def _seed_dropout(model: TinyFluxDeep, seeds: Tensor) -> None:
    """Give the model's dropout layers the seeds ``[B]`` of the samples that come next."""
    for module in model.modules():
        if isinstance(module, SampleDropout):
            module.seeds = seeds


def _velocity_loss(
    pred: Tensor,
    target: Tensor,
    grid: tuple[int, int],
    t: Tensor,
    batch: TrainBatch,
    teachers: Teachers,
    config: TrainerConfig,
) -> Tensor:
    """The configured loss of velocities ``[B, N, C]`` against ``target``, of ``grid`` tokens."""
    snr_weights = None
    if config.use_snr_weighting:
        snr_weights = min_snr_weight(t, config.snr_gamma, config.snr_kind)
    return compute_main_loss(
        pred,
        target,
        mask=batch.mask,
        spatial_weights=teachers.importance() if config.use_spatial_weighting else None,
        use_huber=config.use_huber_loss,
        huber_delta=config.huber_delta,
        snr_weights=snr_weights,
        grid=grid,
    )
