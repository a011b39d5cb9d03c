"""The ``workers``, ``sample`` and ``cluster`` sections of a run file."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest
from tinyflux.util.picture_size import FormerSides, PictureSize

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


@dataclass
class SampleConfig:
    """What to draw.

    Attributes:
        prompts: The prompts, one picture each.
        prompts_file: More prompts: one per line of a text file, or of a ``.jsonl`` file with
            settings of their own.
        num_steps: Denoising steps of a picture.
        guidance_scale: Scale of classifier-free guidance; 1 is without.
        size: Size in pixels, such as 512 or 640x480 (width and height); None: 512.
        height: Height in latents, the former way to say ``size``; it goes with the next release.
        width: Width in latents, as ``height``.
        seed: The i-th prompt uses ``seed + i``.
        negative_prompt: What pictures should not show; guidance leads away from it.
        checkpoint: A checkpoint's directory, file, hub repository or URL; None is the run's
            ``final``.
        output_dir: Where pictures are written, a directory or a URL; None is ``drawn`` in the run
            directory.
        batch_size: Pictures drawn at once.
        num_actors: Number of processes that draw.
        cpus_per_actor: CPUs that Ray reserves for each of them.
        gpus_per_actor: GPUs that Ray reserves for each of them; 0 draws on CPUs.
    """

    former_sides: ClassVar = FormerSides("sample", "size", "height", "width")

    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    num_steps: int = 28
    guidance_scale: float = 5.0
    size: int | str | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    negative_prompt: str = ""
    checkpoint: str | None = None
    output_dir: str | None = None
    batch_size: int = 16
    num_actors: int = 1
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_actors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sample.{name} must be at least 1, not {getattr(self, name)}")
        self.former_sides.check(self)

    def picture_size(self, downscale: int) -> PictureSize:
        """The size of pictures, with a VAE that makes ``downscale`` pixels of a latent's side.

        Raises:
            ConfigError: latents cannot fill it.
        """
        return self.former_sides.in_pixels(self, downscale, default=512, former_default=64)


GB, TFLOP = 1e9, 1e12


class Gpu(NamedTuple):
    """Memory in GB, and dense peaks in TFLOP/s: of bf16, and of float32 without tensor cores."""

    memory_gb: float
    tflops: float
    tflops_float32: float


# From NVIDIA's public data sheets, without sparsity.
GPUS = {
    "A10": Gpu(24, 125, 31.2),
    "A100-40GB": Gpu(40, 312, 19.5),
    "A100-80GB": Gpu(80, 312, 19.5),
    "H100": Gpu(80, 989, 67),
    "H200": Gpu(141, 989, 67),
    "L4": Gpu(24, 121, 30.3),
    "L40S": Gpu(48, 362, 91.6),
}


class Speed(NamedTuple):
    """FLOPs that a process reaches in a second, 0 where that is not known.

    Attributes:
        products: of matrix products and attention.
        convolutions: of convolutions.
    """

    products: float
    convolutions: float


@dataclass
class ClusterConfig:
    """What ``tinyflux plan`` is told of a cluster. What is left at 0 is not stated, nor checked.

    Attributes:
        nodes: Number of machines, all alike.
        gpus_per_node: GPUs of a machine; 0 plans for workers on CPUs.
        gpu: The GPU's name, one of ``GPUS``, whose memory and peak stand in for those not stated.
        gpu_memory_gb: Memory of one GPU, in 1e9 bytes.
        tflops: The bf16 peak of one GPU or, without GPUs, the fp32 peak of one worker.
        tflops_float32: The fp32 peak of one GPU, without tensor cores.
        mfu: Share of the peak that work reaches.
        cpus_per_node: CPUs of a machine.
        memory_gb_per_node: Memory of a machine, GPUs apart, in 1e9 bytes.
        network_gbit: What a node sends to others, and receives, in 1e9 bits a second.
        link_gb_per_s: What a GPU sends to another of its node, in 1e9 bytes a second; 32 is PCIe
            4.0 x16.
        storage_gb: Room for caches and checkpoints, in 1e9 bytes.
        storage_gb_per_s: What shared storage gives one node, in 1e9 bytes a second.
        storage_gb_per_s_in_all: What shared storage gives all nodes together; 0: as much as they
            ask for.
        price_per_node_hour: Price of a machine for an hour, in any currency.
        samples: Number of samples to plan for; 0: those of the cache, or of an estimate of it.
        caption_tokens: T5 tokens of a caption, where only those are stored.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str = ""
    gpu_memory_gb: float = 0.0
    tflops: float = 0.0
    tflops_float32: float = 0.0
    mfu: float = 0.35
    cpus_per_node: int = 0
    memory_gb_per_node: float = 0.0
    network_gbit: float = 10.0
    link_gb_per_s: float = 32.0
    storage_gb: float = 0.0
    storage_gb_per_s: float = 0.5
    storage_gb_per_s_in_all: float = 0.0
    price_per_node_hour: float = 0.0
    samples: int = 0
    caption_tokens: int = 32

    def __post_init__(self) -> None:
        if self.gpu and self.gpu not in GPUS:
            raise ConfigError(
                f"cluster.gpu '{self.gpu}' is unknown{nearest(self.gpu, GPUS)}: choose one of "
                f"{', '.join(GPUS)}, or state cluster.gpu_memory_gb and cluster.tflops"
            )
        if self.nodes < 1 or not 0 < self.mfu <= 1:
            raise ConfigError("cluster.nodes must be at least 1, cluster.mfu above 0 and at most 1")
        for name in ("network_gbit", "link_gb_per_s", "storage_gb_per_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"cluster.{name} must be above 0, not {getattr(self, name)}")
        for name in (
            "gpus_per_node", "gpu_memory_gb", "tflops", "tflops_float32", "cpus_per_node",
            "memory_gb_per_node", "storage_gb", "storage_gb_per_s_in_all", "price_per_node_hour",
            "samples", "caption_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(f"cluster.{name} must be 0 or more, not {getattr(self, name)}")

    @property
    def gpu_bytes(self) -> float:
        """Memory of one GPU, 0 if not stated."""
        known = GPUS[self.gpu].memory_gb if self.gpu else 0.0
        return (self.gpu_memory_gb or known) * GB

    def speed(self, dtype: torch.dtype, on_gpu: bool) -> Speed:
        """What one process reaches that computes in ``dtype``, on a GPU or on CPUs."""
        if not on_gpu:
            peak = 0.0 if self.gpus_per_node else self.tflops  # else ``tflops`` is a GPU's
            return Speed(*[peak * TFLOP * self.mfu] * 2)
        known = GPUS[self.gpu] if self.gpu else Gpu(0, 0, 0)
        half = self.tflops or known.tflops
        products = convolutions = half
        if dtype == torch.float32:
            # torch lets cuDNN's convolutions use TF32, which has half of bf16's peak, and no
            # products.
            products, convolutions = self.tflops_float32 or known.tflops_float32, half / 2
        return Speed(products * TFLOP * self.mfu, convolutions * TFLOP * self.mfu)

    @property
    def network(self) -> float:
        """Bytes a second out of a node."""
        return self.network_gbit * GB / 8

    def storage(self, nodes: int) -> float:
        """Bytes a second that shared storage gives ``nodes`` together."""
        asked = self.storage_gb_per_s * nodes
        return min(asked, self.storage_gb_per_s_in_all or asked) * GB
