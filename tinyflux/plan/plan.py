"""``tinyflux plan``: bytes, hours, memory and money of a run, and what holds it up."""

import json
from dataclasses import dataclass
from typing import Any

from tinyflux.errors import ConfigError
from tinyflux.plan.cache import CachePlan, plan_cache
from tinyflux.plan.cluster import GB
from tinyflux.plan.training import TrainingPlan, plan_training
from tinyflux.util.config import to_dict

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
        hours: of the cache and of training, one after the other; without the cache's where those
            are not known.
        price: of ``cluster.nodes`` for so long; 0 if no price is stated.
        bottleneck: what takes most of the hours, and what would shorten it.
    """

    cache: CachePlan
    training: TrainingPlan
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
        return "\n".join([*_cache_lines(self.cache), "", *_training_lines(self.training), "",
                          *self._total_lines()])  # fmt: skip

    def _total_lines(self) -> list[str]:
        money = f", {self.price:,.2f} at the stated price" if self.price else ""
        unknown = "" if self.cache.hours is not None else ", the cache's not counted"
        return [
            f"total: {_duration(self.hours)} on {self.nodes} nodes{money}{unknown}",
            f"bottleneck: {self.bottleneck}",
        ]


def make_plan(run: Any, measured: bool = False, calibrated: bool = False) -> Plan:
    """Plan a ``RunConfig``; see :func:`plan_cache` and :func:`plan_training`.

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
    return Plan(cache, training, cluster.nodes, hours, price, _bottleneck(cache, training))


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


def _cache_lines(cache: CachePlan) -> list[str]:
    lines = [
        f"cache ({cache.origin}): {cache.samples:,} samples in {cache.shards:,} shards, "
        f"{cache.actors} actors on {cache.nodes} nodes",
        f"  {'group':10}{'size':>14}{'a sample':>14}{'s, alone':>12}",
    ]
    for group, size in cache.bytes.items():
        seconds = cache.seconds_per_sample.get(group)
        alone = "" if seconds is None else f"{seconds:.4f}"
        lines.append(f"  {group:10}{_size(size):>14}{_size(size / cache.samples):>14}{alone:>12}")
    keeping = cache.bookkeeping
    hours = "not known: --measure finds out" if cache.hours is None else _duration(cache.hours)
    return [
        *lines,
        f"  {'together':10}{_size(cache.total_bytes):>14}  {hours}",
        f"  kept in {keeping['files']:,} files and a manifest of {_size(keeping['manifest'])}; "
        f"memory for it: {_size(keeping['driver'])} in the build's driver, "
        f"{_size(keeping['worker'])} in each training worker",
    ]


def _training_lines(training: TrainingPlan) -> list[str]:
    kinds = list(next(iter(training.memory.values())))
    for stage in training.memory.values():
        kinds += [kind for kind in stage if kind not in kinds]
    lines = [
        f"training: {training.parameters / 1e6:,.1f} M parameters, {training.workers} workers on "
        f"{training.nodes} nodes, {training.micro_batch} samples at a time",
        "  " + "".join([f"{'GB a worker':14}", *(f"{f'ZeRO {at}':>10}" for at in training.memory)]),
    ]
    for kind in kinds:
        cells = (f"{stage.get(kind, 0) / GB:10.2f}" for stage in training.memory.values())
        lines.append("  " + "".join([f"{kind:14}", *cells]))
    totals = (f"{sum(stage.values()) / GB:10.2f}" for stage in training.memory.values())
    lines.append("  " + "".join([f"{'together':14}", *totals]))
    if training.smallest_stage is not None:
        lines.append(
            f"  fits {training.limit / GB:.1f} GB from stage {training.smallest_stage} on; the run "
            f"has stage {training.stage}"
        )
    share = "".join(f"{size / GB:10.3f}" for size in training.sent.values())
    lines += [
        "  " + f"{'sent a step':14}" + share,
        f"  a step: {training.step_seconds:.4g} s ({1 / training.step_seconds:.4g} a second) = "
        f"{training.compute:.4g} computing ({training.origin}) + {training.communication:.4g} "
        f"communication; {training.reading:.4g} reading beside it",
        f"  a checkpoint: {_size(training.checkpoint_bytes)}, "
        f"{training.checkpoint_seconds:.1f} s, of which training waits {training.stall:.1f}; "
        f"{_size(training.bytes_kept)} are kept",
        f"  {training.steps:,} steps, {training.epochs:.2f} epochs: {_duration(training.hours)}",
    ]
    return lines


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
