"""The ``cluster`` section of a run file: the machines that a run is planned for."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tinyflux.errors import ConfigError
from tinyflux.util.config import nearest

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
