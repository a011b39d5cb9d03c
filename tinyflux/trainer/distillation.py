"""What the teachers Lune and Sol say about a batch, and the student's losses against it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.data.batches import TrainBatch
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.experts import SolUnits
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.losses import compute_lune_loss, compute_sol_loss
from tinyflux.util.buckets import interpolate_buckets

# So many pictures tell the spread of Sol's features within 2%.
SOL_SAMPLES = 2048


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
        predicted = experts["sol_stats_pred"], experts["sol_spatial_pred"]
        target = teachers.sol_stats, teachers.sol_spatial
        if sol_units is not None:
            predicted = sol_units.standardise(*predicted, t)
            target = sol_units.standardise(*target, t)
        sol = compute_sol_loss(*predicted, *target, teachers.sol_mask)
    return lune, sol
