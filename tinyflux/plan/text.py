"""A plan's tables and sentences for people."""

from collections.abc import Iterable

from tinyflux.distributed.config import GB
from tinyflux.plan.cache import CachePlan
from tinyflux.plan.evaluation import EvaluationPlan
from tinyflux.plan.training import TrainingPlan
from tinyflux.util.text import duration, rounded, size


def cache_lines(cache: CachePlan) -> list[str]:
    """Bytes and seconds by column group, and what building and keeping the cache takes."""
    width = max(10, *(len(group) + 1 for group in cache.bytes))
    lines = [
        f"cache ({cache.origin}): {cache.samples:,} samples in {cache.shards:,} shards, "
        f"{cache.actors} actors on {cache.nodes} nodes",
        *([f"  {cache.note}"] if cache.note else []),
        f"  {'group':{width}}{'size':>14}{'a sample':>14}{'s, alone':>12}",
    ]
    seconds = cache.seconds_per_sample
    for group, count in cache.bytes.items():
        alone = rounded(seconds[group]) if group in seconds else ""
        lines.append(
            f"  {group:{width}}{size(count):>14}{size(count / cache.samples):>14}{alone:>12}"
        )
    together = rounded(cache.seconds_together) if cache.seconds_together else ""
    each = size(cache.total_bytes / cache.samples)
    lines.append(f"  {'together':{width}}{size(cache.total_bytes):>14}{each:>14}{together:>12}")
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


def training_lines(training: TrainingPlan) -> list[str]:
    """Memory and seconds by ZeRO stage, a step, a checkpoint, and the whole run."""
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


def evaluation_lines(evaluation: EvaluationPlan) -> list[str]:
    """How many pictures an evaluation draws, and what one and all of them take."""
    time = "  time: not known: state cluster.gpu or cluster.tflops"
    if evaluation.seconds is not None and evaluation.hours is not None:
        time = (
            f"  a picture takes an actor {duration(evaluation.seconds)}; all of it: "
            f"{duration(3600 * evaluation.hours)}"
        )
    real = f", {evaluation.decoded:,} real ones decoded" if evaluation.decoded else ""
    return [
        f"evaluation ({evaluation.origin}): at most {evaluation.pictures:,} pictures drawn{real}, "
        f"{evaluation.actors} actors on {evaluation.nodes} nodes",
        f"  {evaluation.forwards} forwards a picture, "
        f"{rounded(evaluation.flops_per_picture / 1e12, 3)} TFLOP with the decoder",
        time,
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
