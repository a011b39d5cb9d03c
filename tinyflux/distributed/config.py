"""The ``workers`` section of a run file."""

from dataclasses import dataclass

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

ENGINES = ("deepspeed", "torch")


@dataclass
class WorkersConfig:
    """The processes of a training run.

    Attributes:
        num_workers: Number of processes, each with its share of every batch.
        min_workers: Go on with fewer, down to this, while the cluster has no room for all, and with
            more again when it has; None waits for all of them.
        resize_seconds: With ``min_workers``, how often to look for room for more workers; each
            change of their number goes back to the latest checkpoint.
        cpus_per_worker: Ray CPUs, and threads, of each worker.
        use_gpu: Give each worker a GPU.
        engine: ``"deepspeed"``, or ``"torch"`` for plain data parallelism.
        zero_stage: What DeepSpeed shards: 0 nothing, 1 the optimizer's state, 2 gradients too, 3
            weights too.
        offload: With DeepSpeed, keep the optimizer's state in CPU memory.
        max_failures: How often dead workers are replaced before the run gives up; -1 always.
        evaluator_gpus: With ``use_gpu``, the share of a GPU of the process that validates and draws
            beside training. Below 1 it comes off the workers' requests, so that a worker's GPU has
            room for it; 0 leaves it on the CPU.
        evaluator_seconds: How long training waits for that process before a checkpoint or its next
            look; what takes longer is given up with a line.
    """

    num_workers: int = 1
    min_workers: int | None = None
    resize_seconds: float = 60.0
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    engine: str = "deepspeed"
    zero_stage: int = 2
    offload: bool = False
    max_failures: int = 2
    evaluator_gpus: float = 0.25
    evaluator_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(
                f"workers.engine '{self.engine}' is unknown{nearest(self.engine, ENGINES)}: "
                f"choose one of {', '.join(ENGINES)}"
            )
        if self.num_workers < 1 or self.cpus_per_worker <= 0 or self.max_failures < -1:
            raise ConfigError(
                "workers.num_workers must be at least 1, cpus_per_worker above 0 and "
                "max_failures 0 or more, or -1"
            )
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ConfigError(
                f"workers.min_workers must be from 1 to workers.num_workers = {self.num_workers}, "
                f"not {self.min_workers}"
            )
        if not 0 < self.evaluator_seconds <= 1200:
            # Collectives, in which the other workers wait meanwhile, end after 1,800 seconds.
            raise ConfigError(
                f"workers.evaluator_seconds must be above 0 and at most 1200, not "
                f"{self.evaluator_seconds}"
            )
        if self.evaluator_gpus < 0:
            raise ConfigError(
                f"workers.evaluator_gpus must be 0 or more, not {self.evaluator_gpus}"
            )
        if self.use_gpu and self.min_workers is not None and 0 < self.evaluator_gpus < 1:
            # Ray Train counts by whole GPUs how many workers fit.
            raise ConfigError(
                "with workers.min_workers the evaluator cannot share a worker's GPU: set "
                "workers.evaluator_gpus to 1, or to 0 for the CPU"
            )
        if self.offload and self.engine != "deepspeed":
            raise ConfigError("workers.offload needs workers.engine 'deepspeed'")

    @property
    def gpus_per_worker(self) -> float:
        """Ray GPUs of each worker: one, or what an evaluator on the same GPU leaves of it."""
        if not self.use_gpu:
            return 0.0
        return 1 - self.evaluator_gpus if self.evaluator_gpus < 1 else 1.0
