"""Losses on the held-out samples, as the student is used: without teachers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyflux.data.batches import HeldOut, TrainBatch
from tinyflux.model.experts import SolUnits
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.distillation import Teachers, distillation_losses, teacher_features
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.losses import compute_main_loss, compute_sol_loss
from tinyflux.trainer.step import Velocity
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import randn_for

# At which held-out losses are taken.
TIMES = tuple((index + 0.5) / 8 for index in range(8))
# Before the names of the losses at one of them; the middle is in sixteenths.
AT_TIMES = tuple(f"at_{round(16 * time):02}_" for time in TIMES)


@torch.no_grad()
def validate(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: Tensor,
    ema: EMA | None = None,
    velocity: Velocity | None = None,
) -> dict[str, float]:
    """Mean losses over the held-out samples at 8 fixed times.

    The velocity's is the plain mean squared error, whatever loss is trained. As in use, the student
    sees no teacher. The noise comes from (key, time) alone, so a figure does not depend on the
    run's seed, batches or workers, and validation changes nothing in training.

    Returns:
        ``val_velocity``, and ``val_lune`` and ``val_sol`` where there are teachers. With
        ``sol_standardize`` also ``val_sol_relative``: ``val_sol`` over the same loss of a constant,
        what the training pictures have on the mean at each time. With ``config.validate_times``
        also each loss at each time, such as ``at_01_velocity`` at 1/16, and the velocity's and
        these under the null caption, if ``held_out`` has it, with ``_null`` behind. With ``ema``
        also each of all that with ``_ema`` behind.
    """
    call = velocity or model
    training = model.training
    model.eval()
    try:
        values = _all_losses(model, held_out, config, t_buckets, call)
        if ema is not None:
            ema.apply_shadow(model)
            try:
                averaged = _all_losses(model, held_out, config, t_buckets, call)
            finally:
                ema.restore(model)
            values.update({f"{name}_ema": value for name, value in averaged.items()})
    finally:
        model.train(training)
    return values


def _all_losses(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: Tensor,
    velocity: Velocity,
) -> dict[str, float]:
    """What is asked for of the weights that ``model`` has."""
    values = _held_out_losses(model, held_out, config, t_buckets, velocity)
    uncaptioned = held_out.without_captions() if config.validate_times else None
    if uncaptioned is not None:
        unprompted = _held_out_losses(model, uncaptioned, config, t_buckets, velocity)
        values |= {f"{name}_null": value for name, value in unprompted.items()}
    return values


def _held_out_losses(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: Tensor,
    velocity: Velocity,
) -> dict[str, float]:
    """Means over all samples and times, and at each time where that is asked for, by name."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, device=device)
    at_times = torch.zeros(len(TIMES), 4, device=device)
    count = 0
    has_lune = has_sol = False
    for stored, keys in zip(held_out.batches, held_out.keys, strict=True):
        batch = stored.to(device)
        for index, time in enumerate(TIMES):
            t = torch.full((len(batch),), time, device=device)
            noise = _noise_of(keys, index, batch).to(device)
            teachers = teacher_features(batch, model.config, config, t, t_buckets)
            losses = _losses_at(t, noise, batch, teachers, model, config, velocity)
            sums += losses * len(batch)
            at_times[index] += losses * len(batch)
            count += len(batch)
            has_lune |= teachers.lune is not None
            has_sol |= teachers.sol_stats is not None
    main, lune, sol, constant = (sums / max(1, count)).tolist()
    values = {"val_velocity": main}
    if has_lune:
        values["val_lune"] = lune
    if has_sol:
        values["val_sol"] = sol
        if model.sol_units is not None:
            values["val_sol_relative"] = sol / max(constant, 1e-12)
    if config.validate_times:
        heads = {"velocity": True, "lune": has_lune, "sol": has_sol}
        means = (at_times * len(TIMES) / max(1, count)).tolist()
        values |= {
            f"{prefix}{head}": row[column]
            for prefix, row in zip(AT_TIMES, means, strict=True)
            for column, (head, there) in enumerate(heads.items())
            if there
        }
    return values


def _noise_of(keys: Sequence[str], time_index: int, batch: TrainBatch) -> Tensor:
    """``[B, C, H, W]``: each sample's own noise at one of :data:`TIMES`."""
    shape = batch.latents.shape[1:]
    return torch.stack([randn_for(shape, "validation", key, time_index) for key in keys])


def _losses_at(
    t: Tensor,
    noise: Tensor,
    batch: TrainBatch,
    teachers: Teachers,
    model: TinyFluxDeep,
    config: TrainerConfig,
    velocity: Velocity,
) -> Tensor:
    """``[4]`` at times ``t`` ``[B]``: of the velocity, Lune, Sol, and Sol's of a constant."""
    data, patch = batch.latents.float(), model.config.patch_size
    grid = token_grid(*batch.grid, patch)
    pred, experts = velocity(
        pack_latents(flow_x_t(data, noise, t), patch),
        batch.t5_embeds.float(),
        batch.clip_pooled.float(),
        t,
        TinyFluxDeep.create_img_ids(len(batch), *grid, device=data.device),
        return_expert_pred=True,
        grid=grid,
    )
    target = pack_latents(flow_velocity(data, noise), patch)
    main = compute_main_loss(pred, target, use_huber=False)
    lune, sol = distillation_losses(experts, teachers, config, model.sol_units, t)
    constant = _constant_loss(teachers, model.sol_units, t)
    return torch.stack([main, lune, sol, constant.to(sol)])


def _constant_loss(teachers: Teachers, units: SolUnits | None, t: Tensor) -> Tensor:
    """Sol's loss of the training pictures' mean at times ``t`` ``[B]``; 0 without its units."""
    if units is None or teachers.sol_stats is None or teachers.sol_spatial is None:
        return torch.zeros(())
    stats, spatial = units.standardise(teachers.sol_stats, teachers.sol_spatial, t)
    mean = torch.zeros_like(stats), torch.zeros_like(spatial)
    return compute_sol_loss(*mean, stats, spatial, teachers.sol_mask)
