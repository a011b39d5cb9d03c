"""What training will take: memory by ZeRO stage, steps a second, checkpoints."""

from dataclasses import dataclass

import torch

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB, ClusterConfig, WorkersConfig
from tinyflux.distributed.data import check_batch_size
from tinyflux.distributed.deepspeed import check_zero
from tinyflux.distributed.memory import FP32, buffer_bytes, sent_bytes, worker_bytes
from tinyflux.errors import ConfigError
from tinyflux.plan.cache import CachePlan
from tinyflux.plan.work import StepWork, calibrate, step_work
from tinyflux.trainer.config import TrainerConfig
from tinyflux.util.config import dtype_name
from tinyflux.util.device import resolve_device

# CUDA's context, cuBLAS, NCCL and what the allocator cannot use.
GPU_RESERVE = 2 * GB
# A process with torch, Ray and DeepSpeed in it, before it has a model.
PROCESS = 0.9 * GB
ON_CPU_WITH_OFFLOAD = ("master", "moments")


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
        return max(self.compute + self.communication, self.reading)


def plan_training(run: RunConfig, cache: CachePlan, calibrated: bool) -> TrainingPlan:
    """Plan the run's training.

    Args:
        calibrated: measure a step here, on what must be the cluster's kind of worker.

    Raises:
        ConfigError: what cannot fit, or a speed that nobody stated.
    """
    cluster, workers, trainer = run.cluster, run.workers, run.trainer
    check_batch_size(trainer, workers.num_workers)
    stages = (0, 1, 2, 3) if workers.engine == "deepspeed" else (0,)
    stage = workers.zero_stage if workers.engine == "deepspeed" else 0
    if workers.engine == "deepspeed":
        check_zero(trainer, stage, workers.offload)
    nodes, each = _nodes(workers, cluster)
    count, parts = workers.num_workers, trainer.gradient_accumulation
    micro_batch = -(-trainer.batch_size // (count * parts))
    work = step_work(run.model, trainer, micro_batch, cache.grid)
    memory = {at: _memory(work, run, at) for at in stages}
    limit = _limit(workers, cluster, each)
    fitting = [at for at in stages if sum(memory[at].values()) <= limit]
    if limit:
        _check_memory(memory, fitting, stage, limit, micro_batch)
    _check_host(work, run, each)

    seconds, origin = _seconds(run, work, micro_batch, cache.grid, calibrated)
    sent = {at: sent_bytes(work.parameters, work.trainable, count, at, parts) for at in stages}
    link = cluster.network if nodes > 1 else cluster.link_gb_per_s * GB
    read = trainer.batch_size * cache.bytes_read / cluster.storage(nodes)
    size = FP32 * (work.parameters + 3 * work.trainable)
    gathered = size if stage == 3 else size - FP32 * work.parameters
    gathering = gathered * (count - 1) / count / link
    writing = size / cluster.storage(1)
    stall = gathering + (0.0 if trainer.async_checkpoints else writing)
    every = trainer.save_every_steps
    saved = trainer.total_steps // every if every else 0
    steps = {at: max(parts * seconds + sent[at] / link, read) for at in stages}
    step = steps[stage]
    interval = every * step if every else 0.0
    if trainer.async_checkpoints and saved:
        stall += max(0.0, writing - interval)  # the next one waits for the one before
    samples = trainer.total_steps * trainer.batch_size
    return TrainingPlan(
        origin=origin,
        parameters=work.parameters,
        workers=count,
        nodes=nodes,
        micro_batch=micro_batch,
        flops_per_sample=work.flops / micro_batch,
        memory=memory,
        limit=limit,
        stage=stage,
        smallest_stage=min(fitting, default=None),
        compute=parts * seconds,
        communication=sent[stage] / link,
        reading=read,
        sent=sent,
        seconds_by_stage=steps,
        cheapest_stage=min(fitting if limit else stages, key=lambda at: (steps[at], -at)),
        checkpoint_bytes=size,
        checkpoint_seconds=gathering + writing,
        stall=stall,
        bytes_kept=min(saved, trainer.keep_last_n_steps) * size + 2 * FP32 * work.parameters,
        steps=trainer.total_steps,
        epochs=samples / (cache.samples * (1 - trainer.val_fraction)),
        hours=(trainer.total_steps * step + saved * stall) / 3600,
    )


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
    speed = run.cluster.speed(trainer.dtype, workers.use_gpu).products
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


def _memory(work: StepWork, run: RunConfig, stage: int) -> dict[str, float]:
    """Bytes of each kind on one worker's GPU or, without GPUs, in its process."""
    workers = run.workers
    kinds: dict[str, float] = dict(
        worker_bytes(work.parameters, workers.num_workers, stage, work.trainable)
    )
    if workers.offload and stage:
        for kind in ON_CPU_WITH_OFFLOAD:
            del kinds[kind]
    kinds["activations"] = work.activation_bytes
    kinds["buffers"] = buffer_bytes(work.parameters, work.largest, stage)
    if workers.use_gpu and 0 < workers.evaluator_gpus < 1 and _evaluates(run.trainer):
        kinds["evaluator"] = 2 * FP32 * work.parameters  # weights and EMA; its encoders come on top
    kinds["reserve"] = GPU_RESERVE if workers.use_gpu else PROCESS
    return kinds


def _evaluates(trainer: TrainerConfig) -> bool:
    return bool(trainer.validate_every or (trainer.sample_every and trainer.sample_prompts))


def _limit(workers: WorkersConfig, cluster: ClusterConfig, each: int) -> float:
    """Bytes that one worker may have, 0 if not stated."""
    if workers.use_gpu:
        return cluster.gpu_bytes
    return cluster.memory_gb_per_node * GB / each


def _check_memory(
    memory: dict[int, dict[str, float]],
    fitting: list[int],
    stage: int,
    limit: float,
    micro_batch: int,
) -> None:
    needs = sum(memory[stage].values())
    if needs <= limit:
        return
    if any(at > stage for at in fitting):
        # A smaller stage never needs less.
        advice = f"set workers.zero_stage to {min(at for at in fitting if at > stage)}"
    else:
        kind = max(memory[stage], key=lambda name: memory[stage][name])
        advice = f"its {kind} take most of it, so " + (
            "raise trainer.gradient_accumulation or set trainer.gradient_checkpointing"
            if kind == "activations" and micro_batch > 1
            else "use more workers, workers.offload, or a GPU with more memory"
        )
    raise ConfigError(
        f"a worker needs {needs / GB:.1f} GB at ZeRO stage {stage} with {micro_batch} samples at a "
        f"time and has {limit / GB:.1f}: {advice}"
    )


def _check_host(work: StepWork, run: RunConfig, each: int) -> None:
    """Whether a node's memory holds what its workers keep beside GPUs."""
    cluster, workers, trainer = run.cluster, run.workers, run.trainer
    if not (workers.use_gpu and cluster.memory_gb_per_node):
        return
    state = 3 * FP32 * work.trainable
    needs = each * PROCESS
    if workers.offload and workers.zero_stage:
        needs += each * -(-state // workers.num_workers)
    if trainer.async_checkpoints:
        needs += state + FP32 * work.parameters  # of rank 0, on its way to the disk
    if needs > cluster.memory_gb_per_node * GB:
        raise ConfigError(
            f"the node of the first worker needs {needs / GB:.1f} GB of memory beside its GPUs and "
            f"has {cluster.memory_gb_per_node:.1f}: set trainer.async_checkpoints to false, or use "
            f"nodes with more"
        )
