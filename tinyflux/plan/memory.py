"""Memory of a training worker and of its node, by ZeRO stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from tinyflux.config import RunConfig
from tinyflux.distributed.config import GB, ClusterConfig, WorkersConfig
from tinyflux.distributed.memory import FP32, buffer_bytes, worker_bytes
from tinyflux.errors import ConfigError
from tinyflux.plan.work import StepWork
from tinyflux.trainer.config import TrainerConfig

# CUDA's context, cuBLAS, NCCL and what the allocator cannot use.
GPU_RESERVE = 2 * GB
# A process with torch, Ray and DeepSpeed in it, before it has a model.
PROCESS = 0.9 * GB
ON_CPU_WITH_OFFLOAD = ("master", "moments")


@dataclass(frozen=True)
class MemoryPlan:
    """What a worker keeps.

    Attributes:
        by_stage: bytes of each kind, by ZeRO stage.
        limit: bytes that a worker may have; 0 if not stated.
        fitting: stages that fit; none if no limit is stated.
    """

    by_stage: dict[int, dict[str, float]]
    limit: float
    fitting: list[int]


def plan_memory(
    run: RunConfig,
    work: StepWork,
    stages: Sequence[int],
    stage: int,
    micro_batch: int,
    workers_per_node: int,
) -> MemoryPlan:
    """Plan the memory of a worker at each of ``stages``, and check the one that is asked for.

    Raises:
        ConfigError: a worker at ``stage``, or a node's workers together, cannot fit.
    """
    by_stage = {at: _bytes_by_kind(work, run, at) for at in stages}
    limit = _limit(run.workers, run.cluster, workers_per_node)
    fitting = [at for at in stages if sum(by_stage[at].values()) <= limit]
    plan = MemoryPlan(by_stage, limit, fitting)
    if limit:
        _check_worker(plan, stage, micro_batch)
    _check_host(work, run, workers_per_node)
    return plan


def _bytes_by_kind(work: StepWork, run: RunConfig, stage: int) -> dict[str, float]:
    """Bytes of each kind on one worker's GPU or, without GPUs, in its process."""
    workers = run.workers
    kinds: dict[str, float] = dict(
        worker_bytes(work.parameters, workers.num_workers, stage, work.trainable)
    )
    if run.trainer.optimizer != "adamw":  # under plain torch, which cuts no state
        kinds["moments"] = work.moment_bytes(run.trainer.optimizer)
    kinds["ema"] -= FP32 * (work.projectors // workers.num_workers)
    kinds["ema"] *= 1 + len(run.trainer.ema_lengths)
    if workers.offload and stage:
        for kind in ON_CPU_WITH_OFFLOAD:
            del kinds[kind]
    kinds["activations"] = work.activation_bytes
    kinds["buffers"] = buffer_bytes(work.parameters, work.largest, stage)
    if workers.use_gpu and 0 < workers.evaluator_gpus < 1 and _evaluates(run.trainer):
        # Weights and EMA; its encoders come on top.
        kinds["evaluator"] = 2 * FP32 * (work.parameters - work.projectors)
    kinds["reserve"] = GPU_RESERVE if workers.use_gpu else PROCESS
    return kinds


def _evaluates(trainer: TrainerConfig) -> bool:
    return bool(trainer.validate_every or (trainer.sample_every and trainer.sample_prompts))


def _limit(workers: WorkersConfig, cluster: ClusterConfig, workers_per_node: int) -> float:
    """Bytes that one worker may have, 0 if not stated."""
    if workers.use_gpu:
        return cluster.gpu_bytes
    return cluster.memory_gb_per_node * GB / workers_per_node


def _check_worker(plan: MemoryPlan, stage: int, micro_batch: int) -> None:
    kinds = plan.by_stage[stage]
    needs = sum(kinds.values())
    if needs <= plan.limit:
        return
    larger = [at for at in plan.fitting if at > stage]  # a smaller stage never needs less
    if larger:
        advice = f"set workers.zero_stage to {min(larger)}"
    else:
        kind = max(kinds, key=lambda name: kinds[name])
        advice = f"its {kind} take most of it, so " + (
            "raise trainer.gradient_accumulation or set trainer.gradient_checkpointing"
            if kind == "activations" and micro_batch > 1
            else "use more workers, workers.offload, or a GPU with more memory"
        )
    raise ConfigError(
        f"a worker needs {needs / GB:.1f} GB at ZeRO stage {stage} with {micro_batch} samples at a "
        f"time and has {plan.limit / GB:.1f}: {advice}"
    )


def _check_host(work: StepWork, run: RunConfig, workers_per_node: int) -> None:
    """Refuse a node whose memory does not hold what its workers keep beside GPUs; ConfigError."""
    cluster, workers, trainer = run.cluster, run.workers, run.trainer
    if not (workers.use_gpu and cluster.memory_gb_per_node):
        return
    needs = workers_per_node * PROCESS
    if workers.offload and workers.zero_stage:
        state = FP32 * work.trainable + work.moment_bytes(trainer.optimizer)
        needs += workers_per_node * -(-state // workers.num_workers)
    if trainer.async_checkpoints:
        needs += work.checkpoint_bytes(trainer)  # rank 0's copy, on its way to the disk
    if needs > cluster.memory_gb_per_node * GB:
        raise ConfigError(
            f"the node of the first worker needs {needs / GB:.1f} GB of memory beside its GPUs and "
            f"has {cluster.memory_gb_per_node:.1f}: set trainer.async_checkpoints to false, or use "
            f"nodes with more"
        )
