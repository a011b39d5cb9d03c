"""``tinyflux plan``: bytes, hours, memory and money of a run, and what holds it up."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB
from tinyflux.errors import ConfigError
from tinyflux.plan.cache import CachePlan, plan_cache
from tinyflux.plan.training import TrainingPlan, plan_training
from tinyflux.util.config import to_dict
from tinyflux.util.text import duration, rounded, size

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
        money = f", {rounded(self.price)} at the stated price" if self.price else ""
        unknown = "" if self.cache.hours is not None else ", the cache's not counted"
        return [
            f"total: {duration(3600 * self.hours)} on {self.nodes} nodes{money}{unknown}",
            f"bottleneck: {self.bottleneck}",
        ]


def make_plan(run: RunConfig, measured: bool = False, calibrated: bool = False) -> Plan:
    """Plan a run; see :func:`plan_cache` and :func:`plan_training`.

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
        *([f"  {cache.note}"] if cache.note else []),
        f"  {'group':10}{'size':>14}{'a sample':>14}{'s, alone':>12}",
    ]
    seconds = cache.seconds_per_sample
    for group, count in cache.bytes.items():
        alone = rounded(seconds[group]) if group in seconds else ""
        lines.append(f"  {group:10}{size(count):>14}{size(count / cache.samples):>14}{alone:>12}")
    together = rounded(cache.seconds_together) if cache.seconds_together else ""
    each = size(cache.total_bytes / cache.samples)
    lines.append(f"  {'together':10}{size(cache.total_bytes):>14}{each:>14}{together:>12}")
    if len(seconds) > 1:
        lines.append(
            "  together is less than the sum: alone, each reads the pictures, and the teachers "
            "encode them, for itself"
        )
    keeping = cache.bookkeeping
    hours = "not known: --measure finds out"
    if cache.hours is not None:
        hours = duration(3600 * cache.hours) if cache.hours else "none, it is there"
    return [
        *lines,
        f"  time to build it: {hours}",
        f"  kept in {keeping['files']:,} files and a manifest of {size(keeping['manifest'])}; "
        f"memory for it: {size(keeping['driver'])} in the build's driver, "
        f"{size(keeping['worker'])} in each training worker",
    ]


def _training_lines(training: TrainingPlan) -> list[str]:
    kinds = list(next(iter(training.memory.values())))
    for stage in training.memory.values():
        kinds += [kind for kind in stage if kind not in kinds]

    def row(name: str, values: Iterable[float]) -> str:
        return "  " + name.ljust(16) + "".join(f"{rounded(value, 3):>10}" for value in values)

    memory = training.memory
    return [
        f"training: {training.parameters / 1e6:,.1f} M parameters, {training.workers} workers on "
        f"{training.nodes} nodes, {training.micro_batch} samples at a time, "
        f"{rounded(training.flops_per_sample / 1e12, 3)} TFLOP each",
        "  " + "GB a worker".ljust(16) + "".join(f"{f'ZeRO {at}':>10}" for at in memory),
        *(row(kind, (stage.get(kind, 0) / GB for stage in memory.values())) for kind in kinds),
        row("together", (sum(stage.values()) / GB for stage in memory.values())),
        row("sent a step, GB", (count / GB for count in training.sent.values())),
        row("a step, s", training.seconds_by_stage.values()),
        *_stage_lines(training),
        f"  a step: {duration(training.step_seconds)} = {duration(training.compute)} computing "
        f"({training.origin}) + {duration(training.communication)} communication; "
        f"{duration(training.reading)} reading beside it",
        f"  a checkpoint: {size(training.checkpoint_bytes)}, "
        f"{duration(training.checkpoint_seconds)}, of which training waits "
        f"{duration(training.stall)}; {size(training.bytes_kept)} are kept",
        f"  {training.steps:,} steps, {rounded(training.epochs, 3)} epochs: "
        f"{duration(3600 * training.hours)}",
    ]


def _stage_lines(training: TrainingPlan) -> list[str]:
    """Which ZeRO stages fit, and which is cheapest, where there is a choice."""
    if len(training.memory) == 1:
        return []
    fits = ""
    if training.smallest_stage is not None:
        fits = f"fits {size(training.limit)} from stage {training.smallest_stage} on; "
    best, asked = training.cheapest_stage, training.stage
    if training.seconds_by_stage[best] == training.seconds_by_stage[asked]:
        return [f"  {fits}the run's stage {asked} is as fast as any that fits"]
    longer = training.seconds_by_stage[asked] / training.seconds_by_stage[best] - 1
    return [
        f"  {fits}cheapest is workers.zero_stage: {best}; steps of the run's stage {asked} take "
        f"{longer:.0%} longer"
    ]
