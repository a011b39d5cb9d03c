"""``tinyflux plan``: bytes, hours, memory and money of a run, and what holds it up."""

import json
from dataclasses import dataclass

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB
from tinyflux.errors import ConfigError
from tinyflux.plan.cache import CachePlan, plan_cache
from tinyflux.plan.evaluation import EvaluationPlan, plan_evaluation
from tinyflux.plan.text import cache_lines, evaluation_lines, training_lines
from tinyflux.plan.training import TrainingPlan, plan_training
from tinyflux.util.config import to_dict
from tinyflux.util.text import duration, rounded

HELD_UP_BY = {
    "compute": "computing: more or faster workers, or fewer steps, shorten it",
    "communication": "communication between workers: a faster network, a larger batch or a lower "
    "ZeRO stage shortens it",
    "reading": "reading the cache: faster storage shortens it",
    "checkpoints": "waiting for checkpoints: faster storage or fewer of them shorten it",
}


@dataclass(frozen=True)
class Plan:
    """A run, planned.

    Attributes:
        evaluation: of ``tinyflux evaluate``, which ``hours`` leave out; None if it measures
            nothing.
        hours: of the cache and of training, one after the other; without the cache's where those
            are not known.
        price: of ``cluster.nodes`` for so long; 0 if no price is stated.
        bottleneck: what takes most of the hours, and what would shorten it.
    """

    cache: CachePlan
    training: TrainingPlan
    evaluation: EvaluationPlan | None
    nodes: int
    hours: float
    price: float
    bottleneck: str

    def to_json(self) -> str:
        """The plan with its derived figures, for programs."""
        data = to_dict(self)
        data["cache"]["total_bytes"] = self.cache.total_bytes
        data["cache"]["bookkeeping"] = self.cache.bookkeeping
        data["training"]["step_seconds"] = self.training.step_seconds
        return json.dumps(data, indent=1)

    def __str__(self) -> str:
        parts = [cache_lines(self.cache), training_lines(self.training)]
        if self.evaluation is not None:
            parts.append(evaluation_lines(self.evaluation))
        parts.append(self._total_lines())
        return "\n\n".join("\n".join(lines) for lines in parts)

    def _total_lines(self) -> list[str]:
        money = f", {rounded(self.price)} at the stated price" if self.price else ""
        unknown = "" if self.cache.hours is not None else ", the cache's not counted"
        apart = ", the evaluation apart" if self.evaluation is not None else ""
        return [
            f"total: {duration(3600 * self.hours)} on {self.nodes} nodes{money}{unknown}{apart}",
            f"bottleneck: {self.bottleneck}",
        ]


def make_plan(run: RunConfig, measured: bool = False, calibrated: bool = False) -> Plan:
    """Plan a run; see :func:`plan_cache`, :func:`plan_training` and :func:`plan_evaluation`.

    Args:
        measured: index the pictures and encode a few batches first, on Ray.

    Raises:
        ConfigError: what cannot fit, or what nobody stated.
    """
    if measured:
        from tinyflux.distributed.build import plan_cache as measure

        measure(run.data, run.zoo, run.cache, run.model)
    cluster = run.cluster
    cache = plan_cache(run)
    training = plan_training(run, cache, calibrated)
    kept = cache.total_bytes + training.bytes_kept
    if cluster.storage_gb and kept > cluster.storage_gb * GB:
        raise ConfigError(
            f"the cache ({cache.total_bytes / GB:.1f} GB) and the checkpoints that are kept "
            f"({training.bytes_kept / GB:.1f} GB) do not fit cluster.storage_gb = "
            f"{cluster.storage_gb:g}: use more storage, or lower trainer.keep_last_n_steps"
        )
    hours = (cache.hours or 0.0) + training.hours
    price = hours * cluster.nodes * cluster.price_per_node_hour
    return Plan(
        cache,
        training,
        plan_evaluation(run, cache),
        cluster.nodes,
        hours,
        price,
        _bottleneck(cache, training),
    )


def _bottleneck(cache: CachePlan, training: TrainingPlan) -> str:
    if cache.hours is not None and cache.hours > training.hours:
        seconds = cache.seconds_per_sample
        slowest = max(seconds, key=lambda group: seconds[group])
        return (
            f"the cache, most of all its {slowest} column: more actors (cache.num_actors) shorten "
            f"it"
        )
    waiting = training.hours * 3600 - training.steps * training.step_seconds
    spent = {
        "compute": training.steps * training.compute,
        "communication": training.steps * training.communication,
        "reading": training.steps
        * max(0.0, training.reading - training.compute - training.communication),
        "checkpoints": waiting,
    }
    if training.reading > training.compute + training.communication:
        return f"training, by {HELD_UP_BY['reading']}"
    return f"training, by {HELD_UP_BY[max(spent, key=lambda kind: spent[kind])]}"
