"""What training will take: steps, checkpoints, hours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB, ClusterConfig, WorkersConfig
from tinyflux.distributed.data import check_batch_size
from tinyflux.distributed.deepspeed import check_zero
from tinyflux.distributed.memory import FP32, sent_bytes
from tinyflux.errors import ConfigError
from tinyflux.plan.cache import CachePlan
from tinyflux.plan.memory import plan_memory
from tinyflux.plan.projectors import add_projectors
from tinyflux.plan.work import StepWork, calibrate, step_work
from tinyflux.util.config import dtype_name
from tinyflux.util.device import resolve_device


@dataclass(frozen=True)
class TrainingPlan:
    """Training of a run.

    Attributes:
        micro_batch: samples of a worker's forward.
        flops_per_sample: forward and backward.
        memory: bytes of each kind on a worker, by ZeRO stage.
        limit: bytes that a worker may have; 0 if not stated.
        stage: that the run asks for; ``smallest_stage`` that fits, None if no limit is stated.
        compute, communication, reading: seconds of a step; the first two follow each other,
            reading goes on beside them.
        sent: bytes that a worker sends in a step, by ZeRO stage.
        seconds_by_stage: of a step.
        cheapest_stage: whose steps are shortest among those that fit and, where several are, that
            needs least memory.
        checkpoint_bytes: of one; ``checkpoint_seconds`` to gather and write it.
        stall: seconds that training waits for each.
        bytes_kept: of the run directory's checkpoints and of ``final/``.
        steps, epochs, hours: of the whole run.
    """

    origin: str
    parameters: int
    workers: int
    nodes: int
    micro_batch: int
    flops_per_sample: float
    memory: dict[int, dict[str, float]]
    limit: float
    stage: int
    smallest_stage: int | None
    compute: float
    communication: float
    reading: float
    sent: dict[int, int]
    seconds_by_stage: dict[int, float]
    cheapest_stage: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    stall: float
    bytes_kept: float
    steps: int
    epochs: float
    hours: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a step at the stage that the run asks for."""
        return max(self.compute + self.communication, self.reading)


def plan_training(run: RunConfig, cache: CachePlan, calibrated: bool) -> TrainingPlan:
    """Plan the run's training.

    Args:
        calibrated: measure a step here, on what must be the cluster's kind of worker.

    Raises:
        ConfigError: what cannot fit, or a speed that nobody stated.
    """
    trainer, workers = run.trainer, run.workers
    stages, stage = _stages(run)
    nodes, workers_per_node = _nodes(workers, run.cluster)
    micro_batch = -(-trainer.batch_size // (workers.num_workers * trainer.gradient_accumulation))
    student = step_work(run.model, trainer, micro_batch, cache.grid)
    work = add_projectors(student, run.model, trainer, micro_batch, cache.grid)
    memory = plan_memory(run, work, stages, stage, micro_batch, workers_per_node)
    link = run.cluster.network if nodes > 1 else run.cluster.link_gb_per_s * GB
    seconds, origin = _seconds(run, work, micro_batch, cache.grid, calibrated)
    step = _plan_step(run, work, cache, stages, seconds, link, nodes)
    checkpoint = _plan_checkpoint(run, work, stage, step.seconds[stage], link)
    samples = trainer.total_steps * trainer.batch_size
    fitting = memory.fitting if memory.limit else stages
    return TrainingPlan(
        origin=origin,
        parameters=student.parameters,
        workers=workers.num_workers,
        nodes=nodes,
        micro_batch=micro_batch,
        flops_per_sample=work.flops / micro_batch,
        memory=memory.by_stage,
        limit=memory.limit,
        stage=stage,
        smallest_stage=min(memory.fitting, default=None),
        compute=step.compute,
        communication=step.communication[stage],
        reading=step.reading,
        sent=step.sent,
        seconds_by_stage=step.seconds,
        cheapest_stage=min(fitting, key=lambda at: (step.seconds[at], -at)),
        checkpoint_bytes=checkpoint.bytes,
        checkpoint_seconds=checkpoint.seconds,
        stall=checkpoint.stall,
        bytes_kept=checkpoint.bytes_kept,
        steps=trainer.total_steps,
        epochs=samples / (cache.samples * (1 - trainer.val_fraction)),
        hours=(trainer.total_steps * step.seconds[stage] + checkpoint.saved * checkpoint.stall)
        / 3600,
    )


class _Step(NamedTuple):
    """An optimizer step: seconds of its parts, and bytes that a worker sends, by ZeRO stage."""

    compute: float
    reading: float
    sent: dict[int, int]
    communication: dict[int, float]
    seconds: dict[int, float]


class _Checkpoint(NamedTuple):
    """A checkpoint's size and seconds, how long training waits for it, and how many there are."""

    bytes: int
    seconds: float
    stall: float
    saved: int
    bytes_kept: float


def _stages(run: RunConfig) -> tuple[tuple[int, ...], int]:
    """The ZeRO stages that can be compared, and the one that the run asks for.

    Raises:
        ConfigError: the batch or the stage cannot be trained with these workers.
    """
    check_batch_size(run.trainer, run.workers.num_workers)
    if run.workers.engine != "deepspeed":
        return (0,), 0
    check_zero(run.trainer, run.workers.zero_stage, run.workers.offload)
    return (0, 1, 2, 3), run.workers.zero_stage


def _plan_step(
    run: RunConfig,
    work: StepWork,
    cache: CachePlan,
    stages: Sequence[int],
    seconds: float,
    link: float,
    nodes: int,
) -> _Step:
    """Plan an optimizer step of micro-batches of ``seconds``; ``link`` is bytes a second."""
    count, parts = run.workers.num_workers, run.trainer.gradient_accumulation
    compute = parts * seconds
    reading = run.trainer.batch_size * cache.bytes_read / run.cluster.storage(nodes)
    sent = {at: sent_bytes(work.parameters, work.trainable, count, at, parts) for at in stages}
    communication = {at: sent[at] / link for at in stages}
    return _Step(
        compute,
        reading,
        sent,
        communication,
        {at: max(compute + communication[at], reading) for at in stages},
    )


def _plan_checkpoint(
    run: RunConfig, work: StepWork, stage: int, step_seconds: float, link: float
) -> _Checkpoint:
    trainer, count = run.trainer, run.workers.num_workers
    size = work.checkpoint_bytes(trainer)
    gathered = size if stage == 3 else size - FP32 * work.parameters
    gathering = gathered * (count - 1) / count / link
    writing = size / run.cluster.storage(1)
    every = trainer.save_every_steps
    saved = trainer.total_steps // every if every else 0
    stall = gathering
    if not trainer.async_checkpoints:
        stall += writing
    elif saved and every:
        # The next one waits for the one before.
        stall += max(0.0, writing - every * step_seconds)
    final = 2 * FP32 * (work.parameters - work.projectors)
    kept = min(saved, trainer.keep_last_n_steps) * size + final
    return _Checkpoint(size, gathering + writing, stall, saved, kept)


def _seconds(
    run: RunConfig, work: StepWork, micro_batch: int, grid: tuple[int, int], calibrated: bool
) -> tuple[float, str]:
    """Seconds that a worker computes for a micro-batch, and what they come from."""
    workers, trainer = run.workers, run.trainer
    if calibrated:
        if workers.use_gpu and resolve_device("auto").type != "cuda":
            raise ConfigError(
                "--calibrate measures this machine, which has no GPU, for a run with "
                "workers.use_gpu: calibrate on a node of the cluster, or state cluster.gpu"
            )
        device = resolve_device("cuda" if workers.use_gpu else "cpu")
        return calibrate(run.model, trainer, micro_batch, grid, device), "steps on this machine"
    speeds = run.cluster.speed(trainer.dtype, workers.use_gpu)
    # What torch lets convolutions use of its own accord.
    speed = speeds.convolutions if trainer.tf32 else speeds.products
    if speed:
        precision = f" of {dtype_name(trainer.dtype)}" if workers.use_gpu else ""
        return work.flops / speed, f"{run.cluster.mfu:.0%} of the peak{precision}"
    stated = "cluster.gpu or cluster.tflops"
    if workers.use_gpu and trainer.dtype == torch.float32:
        stated = "cluster.gpu or cluster.tflops_float32"
    if run.cluster.gpus_per_node and not workers.use_gpu:
        stated = "workers.use_gpu, since the cluster's GPUs say nothing of workers on CPUs,"
    raise ConfigError(
        f"the workers' speed is not known: set {stated}, or let --calibrate measure a few steps "
        f"here"
    )


def _nodes(workers: WorkersConfig, cluster: ClusterConfig) -> tuple[int, int]:
    """Nodes that the workers need, and workers on each."""
    count = workers.num_workers
    each = count
    if workers.use_gpu:
        each = min(each, cluster.gpus_per_node)
    if cluster.cpus_per_node:
        each = min(each, int(cluster.cpus_per_node / workers.cpus_per_worker))
    if each * cluster.nodes < count:
        raise ConfigError(
            f"workers.num_workers = {count} do not fit {cluster.nodes} nodes of "
            f"{cluster.gpus_per_node} GPUs and {cluster.cpus_per_node or 'unstated'} CPUs, which "
            f"hold {each} each: state more nodes, or lower workers.num_workers"
        )
    if not workers.use_gpu and not cluster.cpus_per_node:
        each = -(-count // cluster.nodes)
    return -(-count // each), each
