"""The one training step: a batch and a model in, losses out.

Every random number of a sample comes from (seed, its global position in the run). The same global
batch is therefore trained in the same way on any number of workers and micro-batches.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyflux.data.batches import TrainBatch
from tinyflux.errors import InputError
from tinyflux.model.experts import SolUnits
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.model.packing import pack_latents
from tinyflux.model.time_shift import shift_at
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import SampleDropout
from tinyflux.trainer.losses import (
    compute_lune_loss,
    compute_main_loss,
    compute_sol_loss,
    min_snr_weight,
)
from tinyflux.trainer.schedules import get_lune_weight, get_sol_weight, timesteps_from_normal
from tinyflux.util.buckets import interpolate_buckets
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import generator, randn_for

# So many pictures tell the spread of Sol's features within 2%.
SOL_SAMPLES = 2048


class Velocity(Protocol):
    """A :class:`TinyFluxDeep`, or an engine's wrapped and autocast call of one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass
class StepLoss:
    """Losses of a micro-batch, fp32 scalars. Only ``total`` carries a gradient.

    Attributes:
        total: what is minimised: ``main`` plus the weighted ``lune`` and ``sol``.
        main: velocity. lune, sol: unweighted distillation, 0 where off.
    """

    total: Tensor
    main: Tensor
    lune: Tensor
    sol: Tensor

    def stack(self) -> Tensor:
        """``[4]``, detached: total, main, lune, sol."""
        return torch.stack([self.total.detach(), self.main, self.lune, self.sol])


@dataclass
class Draws:
    """All random numbers of a batch, by position.

    Attributes:
        normal: ``[B]`` standard normal, for the time.
        noise: ``[B, C, H, W]`` standard normal.
        text: ``[B]`` uniform, for the dropout of captions.
        teachers: ``[B]`` uniform, for the dropout of both teachers: they are missing together.
        dropout: ``[B]`` int64 seeds of the model's dropout layers.
    """

    normal: Tensor
    noise: Tensor
    text: Tensor
    teachers: Tensor
    dropout: Tensor

    @classmethod
    def at(cls, seed: int, positions: Tensor, shape: tuple[int, ...]) -> "Draws":
        """Draws for samples at ``positions``, whose latents have ``shape`` ``(C, H, W)``.

        A sample's numbers always come in the same order, whatever options are on: the normal, the
        caption's, the teachers', one that was Sol's own and is drawn so that the next stays what
        it was, and the dropout layers' seed.
        """
        places = positions.tolist()
        normal = torch.empty(len(places))
        uniform = torch.empty(len(places), 3)
        dropout = torch.empty(len(places), dtype=torch.int64)
        for row, place in enumerate(places):
            source = generator(seed, "draws", place)
            normal[row] = torch.randn((), generator=source)
            uniform[row] = torch.rand(3, generator=source)
            dropout[row] = torch.randint(2**31, (), generator=source)
        noise = torch.stack([randn_for(shape, seed, "noise", place) for place in places])
        text, teachers, _ = uniform.unbind(-1)
        return cls(normal, noise, text, teachers, dropout)


def training_loss(
    model: TinyFluxDeep,
    batch: TrainBatch,
    config: TrainerConfig,
    step: int,
    null_text: tuple[Tensor, Tensor] | None,
    t_buckets: Tensor,
    velocity: Velocity | None = None,
) -> StepLoss:
    """Losses of one micro-batch at optimizer step ``step``.

    Args:
        model: the bare model, in training mode.
        null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, which stand in
            for dropped captions; None means zeros.
        t_buckets: ``[K]`` times of the batch's teacher features.
        velocity: how to call the model, if not directly (an engine's forward).
    """
    device = batch.latents.device
    draws = Draws.at(config.seed, batch.positions, tuple(batch.latents.shape[1:]))
    t = timesteps_from_normal(
        draws.normal,
        shift=shift_at(config.shift, math.prod(batch.grid), config.shift_tokens),
        logit_normal=config.logit_normal_sampling,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
    ).to(device)
    data, noise = batch.latents.float(), draws.noise.to(device)
    no_text = draws.text < config.text_dropout
    t5, pooled = _drop_text(batch, no_text.to(device), null_text)
    teachers = teacher_features(batch, model.config, config, t, t_buckets)
    for module in model.modules():
        if isinstance(module, SampleDropout):
            module.seeds = draws.dropout.to(device)

    grid = batch.grid
    pred, experts = (velocity or model)(
        pack_latents(flow_x_t(data, noise, t)),
        t5,
        pooled,
        t,
        TinyFluxDeep.create_img_ids(len(batch), *grid, device=device),
        **teachers.seen(
            # As in use: with no teacher at all, and the unconditional branch with nothing.
            (~no_text & (draws.teachers >= config.lune_dropout)).to(device),
            (~no_text & (draws.teachers >= config.sol_dropout)).to(device),
        ),
        return_expert_pred=True,
        grid=grid,
    )
    main = compute_main_loss(
        pred,
        pack_latents(flow_velocity(data, noise)),
        mask=batch.mask,
        spatial_weights=teachers.importance() if config.use_spatial_weighting else None,
        use_huber=config.use_huber_loss,
        huber_delta=config.huber_delta,
        snr_weights=min_snr_weight(t, config.snr_gamma, config.snr_kind)
        if config.use_snr_weighting
        else None,
        grid=grid,
    )
    lune, sol = distillation_losses(experts, teachers, config, model.sol_units, t)
    total = (
        main
        + get_lune_weight(step, config.lune_warmup_steps, config.lune_weight) * lune
        + get_sol_weight(step, config.sol_warmup_steps, config.sol_weight) * sol
    )
    return StepLoss(total, main.detach(), lune.detach(), sol.detach())


@dataclass
class Teachers:
    """Teacher features of a batch at its times; None where a teacher is off or absent.

    Attributes:
        lune: ``[B, D]`` and ``lune_mask`` ``[B]`` bool, the samples that have it.
        sol_stats: ``[B, S]``, sol_spatial: ``[B, s, s]`` and ``sol_mask`` ``[B]`` bool.
    """

    lune: Tensor | None = None
    lune_mask: Tensor | None = None
    sol_stats: Tensor | None = None
    sol_spatial: Tensor | None = None
    sol_mask: Tensor | None = None

    def seen(self, keep_lune: Tensor, keep_sol: Tensor) -> dict[str, Tensor | None]:
        """The model's keyword arguments when only samples ``[B]`` of ``keep_*`` see a teacher."""
        return {
            "lune_features": self.lune,
            "lune_mask": None if self.lune_mask is None else self.lune_mask & keep_lune,
            "sol_stats": self.sol_stats,
            "sol_spatial": self.sol_spatial,
            "sol_mask": None if self.sol_mask is None else self.sol_mask & keep_sol,
        }

    def importance(self) -> Tensor | None:
        """Sol's maps ``[B, s, s]``, even for samples without one."""
        if self.sol_spatial is None or self.sol_mask is None:
            return None
        return torch.where(self.sol_mask[:, None, None], self.sol_spatial, 1.0)


def teacher_features(
    batch: TrainBatch, model: TinyFluxConfig, config: TrainerConfig, t: Tensor, t_buckets: Tensor
) -> Teachers:
    """What the enabled teachers say about the batch at times ``t`` ``[B]``."""
    teachers = Teachers()
    if batch.lune is not None and config.enable_lune and model.use_lune_expert:
        teachers.lune = interpolate_buckets(batch.lune.float(), t_buckets, t)
        teachers.lune_mask = batch.lune_mask
    has_sol = batch.sol_stats is not None and batch.sol_spatial is not None
    if has_sol and config.enable_sol and model.use_sol_prior:
        stats = interpolate_buckets(batch.sol_stats.float(), t_buckets, t)  # type: ignore[union-attr]
        teachers.sol_stats = stats[:, : model.sol_num_stats]
        teachers.sol_spatial = interpolate_buckets(batch.sol_spatial.float(), t_buckets, t)  # type: ignore[union-attr]
        teachers.sol_mask = batch.sol_mask
    return teachers


def distillation_losses(
    experts: dict[str, Tensor],
    teachers: Teachers,
    config: TrainerConfig,
    sol_units: SolUnits | None,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Unweighted Lune and Sol losses, each a scalar, 0 without its teacher.

    With ``sol_units`` Sol's is taken in them: the best guesses that know the times ``t`` ``[B]``
    alone have a loss of 2, 1 for the statistics and 1 for the map.
    """
    zero = torch.zeros((), device=next(iter(experts.values())).device if experts else None)
    lune = sol = zero
    if teachers.lune is not None:
        lune = compute_lune_loss(
            experts["lune_pred"], teachers.lune, config.lune_mode, teachers.lune_mask
        )
    if teachers.sol_stats is not None and teachers.sol_spatial is not None:
        found = experts["sol_stats_pred"], experts["sol_spatial_pred"]
        target = teachers.sol_stats, teachers.sol_spatial
        if sol_units is not None:
            found = sol_units.standardise(*found, t)
            target = sol_units.standardise(*target, t)
        sol = compute_sol_loss(*found, *target, teachers.sol_mask)
    return lune, sol


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


def as_module(model: nn.Module) -> TinyFluxDeep:
    """The bare student inside a compiled or wrapped one."""
    while not isinstance(model, TinyFluxDeep):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise InputError(f"a TinyFluxDeep is needed, not a {type(model).__name__}")
        model = inner
    return model
