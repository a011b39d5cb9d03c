"""A loss that can be compared between runs: fixed samples, times and noise."""

import torch
from torch import Tensor

from tinyflux.data.batches import HeldOut
from tinyflux.model.experts import SolUnits
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.losses import compute_main_loss, compute_sol_loss
from tinyflux.trainer.step import Teachers, Velocity, distillation_losses, teacher_features
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import randn_for

TIMES = tuple((index + 0.5) / 8 for index in range(8))


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
        what the training pictures have on the mean at each time. With ``ema`` also each with
        ``_ema`` behind.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        result = _losses(model, held_out, config, t_buckets, velocity or model, device)
        if ema is not None:
            ema.apply_shadow(model)
            try:
                averaged = _losses(model, held_out, config, t_buckets, velocity or model, device)
            finally:
                ema.restore(model)
            result.update({f"{name}_ema": value for name, value in averaged.items()})
    finally:
        model.train(training)
    return result


def _losses(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: Tensor,
    velocity: Velocity,
    device: torch.device,
) -> dict[str, float]:
    sums = torch.zeros(4, device=device)
    count = 0
    has_lune = has_sol = False
    units = model.sol_units
    for stored, keys in zip(held_out.batches, held_out.keys, strict=True):
        batch = stored.to(device)
        data = batch.latents.float()
        grid = batch.grid
        img_ids = TinyFluxDeep.create_img_ids(len(batch), *grid, device=device)
        for index, time in enumerate(TIMES):
            noise = torch.stack(
                [randn_for(data.shape[1:], "validation", key, index) for key in keys]
            ).to(device)
            t = torch.full((len(batch),), time, device=device)
            teachers = teacher_features(batch, model.config, config, t, t_buckets)
            pred, experts = velocity(
                pack_latents(flow_x_t(data, noise, t)),
                batch.t5_embeds.float(),
                batch.clip_pooled.float(),
                t,
                img_ids,
                return_expert_pred=True,
                grid=grid,
            )
            main = compute_main_loss(
                pred, pack_latents(flow_velocity(data, noise)), use_huber=False
            )
            lune, sol = distillation_losses(experts, teachers, config, units, t)
            has_lune |= teachers.lune is not None
            has_sol |= teachers.sol_stats is not None
            constant = _constant_loss(teachers, units, t)
            sums += torch.stack([main, lune, sol, constant.to(sol)]) * len(batch)
            count += len(batch)
    main_mean, lune_mean, sol_mean, constant_mean = (sums / max(1, count)).tolist()
    result = {"val_velocity": main_mean}
    if has_lune:
        result["val_lune"] = lune_mean
    if has_sol:
        result["val_sol"] = sol_mean
        if units is not None:
            result["val_sol_relative"] = sol_mean / max(constant_mean, 1e-12)
    return result


def _constant_loss(teachers: Teachers, units: SolUnits | None, t: Tensor) -> Tensor:
    """Sol's loss of the training pictures' mean at times ``t`` ``[B]``; 0 without its units."""
    if units is None or teachers.sol_stats is None or teachers.sol_spatial is None:
        return torch.zeros(())
    stats, spatial = units.standardise(teachers.sol_stats, teachers.sol_spatial, t)
    mean = torch.zeros_like(stats), torch.zeros_like(spatial)
    return compute_sol_loss(*mean, stats, spatial, teachers.sol_mask)
