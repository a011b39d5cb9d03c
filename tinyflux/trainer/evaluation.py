"""Looking at a run while it goes on: held-out losses and pictures of fixed prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tinyflux.data.batches import HeldOut, TrainBatch
from tinyflux.inference.sampler import Sampler
from tinyflux.model.experts import SolUnits
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.distillation import Teachers, distillation_losses, teacher_features
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import autocast
from tinyflux.trainer.losses import compute_main_loss, compute_sol_loss
from tinyflux.trainer.picture_figures import PictureFigures
from tinyflux.trainer.step import Velocity
from tinyflux.util.picture_size import fitting_size
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import randn_for

# At which held-out losses are taken.
TIMES = tuple((index + 0.5) / 8 for index in range(8))


@dataclass(frozen=True)
class EvaluationRequest:
    """What to look at.

    Attributes:
        step: optimizer steps done.
        validate: whether to take held-out losses; draw: whether to draw the prompts.
        grid: ``(H, W)`` of the training data's latents, for pictures whose size is not configured.
        measure: whether to draw held-out captions and measure the pictures.
    """

    step: int
    validate: bool
    draw: bool
    grid: tuple[int, int]
    measure: bool = False

    def __bool__(self) -> bool:
        return self.validate or self.draw or self.measure


@dataclass(frozen=True)
class Evaluation:
    """What looking at the weights gave.

    Attributes:
        values: as of :func:`validate` and :meth:`PictureFigures.measure`, what was asked for.
        images: ``[B, 3, H, W]`` in [0, 1], one for each of the config's prompts; or None.
    """

    step: int
    values: dict[str, float] = field(default_factory=dict)
    images: Tensor | None = None


class Evaluations(Protocol):
    """Where a training loop has its weights looked at."""

    def submit(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        """Look at these whole tensors, the model's and the EMA's; they may change afterwards."""

    def take(self, wait: bool = False) -> list[Evaluation]:
        """The evaluations that are done since the last call, in order; with ``wait`` all."""


class Evaluator:
    """Looks at a model and its EMA.

    Args:
        held_out: samples to validate on, or None.
        sampler: draws ``config.sample_prompts`` with the EMA's weights, or None.
        figures: measures pictures that the EMA's weights draw, or None.
    """

    def __init__(
        self,
        model: TinyFluxDeep,
        ema: EMA,
        config: TrainerConfig,
        t_buckets: Tensor,
        held_out: HeldOut | None,
        sampler: Sampler | None,
        figures: PictureFigures | None = None,
    ):
        self.model, self.ema, self.config = model, ema, config
        self._device = next(model.parameters()).device
        self._t_buckets = t_buckets.to(self._device)
        self._held_out, self._sampler, self._figures = held_out, sampler, figures
        # A size that cannot be drawn is told now, and not when the first pictures are due.
        self._sides = _sample_sides(config, sampler)

    def look(self, request: EvaluationRequest) -> Evaluation:
        """Neither the weights nor any random state are changed."""
        values: dict[str, float] = {}
        if request.validate and self._held_out is not None and self._held_out.batches:
            with autocast(self._device, self.config.dtype):
                values = validate(
                    self.model, self._held_out, self.config, self._t_buckets, self.ema
                )
        if request.measure and self._figures is not None:
            values |= self._figures.measure()
        return Evaluation(request.step, values, self._draw(request.grid) if request.draw else None)

    def _draw(self, grid: tuple[int, int]) -> Tensor | None:
        config = self.config
        if self._sampler is None or not config.sample_prompts:
            return None
        return self._sampler.generate(
            config.sample_prompts,
            num_steps=config.sample_steps,
            guidance_scale=config.sample_guidance,
            height=self._sides[0] or grid[0],
            width=self._sides[1] or grid[1],
            seed=config.sample_seed,
            negative_prompt="",
        )


def _sample_sides(config: TrainerConfig, sampler: Sampler | None) -> tuple[int | None, int | None]:
    """Height and width of sample grids' pictures in latents; None is that of the training data."""
    if sampler is None or not config.sample_prompts or config.sample_size is None:
        return config.sample_height, config.sample_width
    step = sampler.zoo.downscale
    width, height = fitting_size(config.sample_size, "trainer.sample_size", step)
    return height // step, width // step


class InlineEvaluator:
    """Evaluations in the training process, on its own model and EMA, while training waits."""

    def __init__(self, evaluator: Evaluator):
        self._evaluator = evaluator
        self._done: list[Evaluation] = []

    def submit(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        self._done.append(self._evaluator.look(request))

    def take(self, wait: bool = False) -> list[Evaluation]:
        done, self._done = self._done, []
        return done


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
    call = velocity or model
    training = model.training
    model.eval()
    try:
        values = _held_out_losses(model, held_out, config, t_buckets, call)
        if ema is not None:
            ema.apply_shadow(model)
            try:
                averaged = _held_out_losses(model, held_out, config, t_buckets, call)
            finally:
                ema.restore(model)
            values.update({f"{name}_ema": value for name, value in averaged.items()})
    finally:
        model.train(training)
    return values


def _held_out_losses(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: Tensor,
    velocity: Velocity,
) -> dict[str, float]:
    """Means over all samples and times, by name."""
    device = next(model.parameters()).device
    sums = torch.zeros(4, device=device)
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
