"""Time and memory of the teachers at SD1.5's size: ``python benchmarks/teachers.py``.

Prints JSON: ratios to the ways that are compared with, all measured in this run. The ways take
turns and a ratio is the median over rounds, so that a busy machine slows both sides of it. Weights
are random; Lune and Sol share them.

The predecessor runs Lune to its end, and for Sol makes every self-attention matrix, keeps them all,
and takes statistics after the forward.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from record import add_json_option, record
from torch import Tensor

from tinyflux.model.teachers import SPATIAL_SIZE, SolFeatures, lune_features, sol_features


@dataclass
class Materialised:
    """An attention processor that keeps every layer's matrix, ``[B, H, N, N]``."""

    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        self.kept.append(torch.softmax((q @ k.mT).float() * attn.scale, dim=-1))
        merged = (self.kept[-1].to(v.dtype) @ v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return out


def features_of(matrices: list[Tensor]) -> SolFeatures:
    """Sol's statistics and map by definition, from ``[B, H, N, N]`` of square grids."""
    stats, maps = [], []
    for matrix in matrices:
        mean, tokens = matrix.mean(1), matrix.shape[-1]
        side, root = math.isqrt(tokens), math.sqrt(tokens)
        line = torch.arange(side, device=matrix.device)
        places = torch.cartesian_prod(line, line).float()
        distance = torch.cdist(places, places)
        locality = 1 - (mean * distance).sum(-1) / distance.max()
        entropy = torch.special.entr(mean).sum(-1) / math.log(tokens)
        sparsity = (root - mean.norm(p=1, dim=-1) / mean.norm(p=2, dim=-1)) / (root - 1)
        stats.append(torch.stack([locality, entropy, 1 - entropy, sparsity], dim=-1).mean(1))
        received = mean.sum(1).view(-1, 1, side, side)
        maps.append(F.interpolate(received, (SPATIAL_SIZE, SPATIAL_SIZE), mode="bilinear")[:, 0])
    spatial = torch.stack(maps).mean(0)
    return SolFeatures(torch.stack(stats).mean(0), spatial / spatial.sum((1, 2), keepdim=True))


class Bench:
    """A UNet of SD1.5's size, inputs of 64x64 latents, and the ways to run them."""

    def __init__(self, batch: int, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
        self.device = device
        self.unet = UNet2DConditionModel(**config).eval().to(device)
        if dtype != torch.float32:  # diffusers warns of a cast to what it is already
            self.unet.to(dtype)
        self.latents = torch.randn(batch, 4, 64, 64).to(device)
        self.sigma = torch.rand(batch).to(device)
        self.text = torch.randn(batch, 77, 768).to(device)

    @torch.no_grad()
    def full(self) -> Tensor:
        """The whole forward with fused attention; the mean of its mid block, ``[B, 1280]``."""
        found: list[Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(
            lambda module, inputs, output: found.append(output.float().mean((2, 3)))
        )
        dtype = self.unet.dtype
        self.unet(self.latents.to(dtype), 1000 * self.sigma, self.text.to(dtype))
        hook.remove()
        return found[0]

    @torch.no_grad()
    def materialised(self) -> SolFeatures:
        """Sol as the predecessor runs it."""
        before, watch = self.unet.attn_processors, Materialised()
        self.unet.set_attn_processor(
            {name: watch if "attn1" in name else before[name] for name in before}
        )
        dtype = self.unet.dtype
        self.unet(self.latents.to(dtype), 1000 * self.sigma, self.text.to(dtype))
        self.unet.set_attn_processor(before)
        return features_of(watch.kept)

    def lune(self) -> Tensor:
        return lune_features(self.unet, self.latents, self.sigma, self.text)

    def sol(self) -> SolFeatures:
        return sol_features(self.unet, self.latents, self.sigma, self.text)

    def seconds(self, way: Callable[[], object]) -> float:
        started = time.perf_counter()
        way()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def peak(self, way: Callable[[], object]) -> int:
        """Bytes that ``way`` needs at most, beyond what the process already holds."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building the UNet
        before = resident("VmRSS")
        way()
        return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process's memory, as Linux counts them under ``name``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of(way: str, *arguments: Any) -> int:
    """Peak memory of one way, meant for a process of its own."""
    bench = Bench(*arguments)
    return bench.peak(getattr(bench, way))


def ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds."""
    return round(float(np.median(np.divide(over, under))), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_json_option(parser)
    given = parser.parse_args()
    arguments = (given.batch_size, given.device, getattr(torch, given.dtype))
    torch.set_num_threads(given.threads)

    ways = ("full", "lune", "sol", "materialised")
    peaks = {}
    # Memory that is freed goes back to the system, so that what the system counts is what is used.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for way in ways:  # each in a fresh process, where the variable counts
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            peaks[way] = fresh.submit(peak_of, way, *arguments).result()
    extra = {way: peaks[way] - peaks["full"] for way in ("sol", "materialised")}

    bench = Bench(*arguments)
    lune_error = (bench.lune() - bench.full()).abs().max() / bench.full().abs().max()
    ours, wanted = bench.sol(), bench.materialised()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.repeats):
        for way in ways:
            times[way].append(bench.seconds(getattr(bench, way)))
    both = np.add(times["lune"], times["sol"]).tolist()
    predecessor = np.add(times["full"], times["materialised"]).tolist()

    result = {
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(),
        "threads": given.threads,
        "load": [round(load, 2) for load in os.getloadavg()],
        "dtype": given.dtype,
        "batch_size": given.batch_size,
        "lune": {
            "time_over_full_forward": ratio(times["lune"], times["full"]),
            "relative_error": float(lune_error),
        },
        "sol": {
            "time_over_fused_forward": ratio(times["sol"], times["full"]),
            "time_over_materialised": ratio(times["sol"], times["materialised"]),
            "extra_memory_over_materialised": round(extra["sol"] / extra["materialised"], 4),
            "statistics_error": float((ours.stats - wanted.stats).abs().max()),
            "map_error": float((ours.spatial - wanted.spatial).abs().max()),
        },
        "both": {"predecessor_time_over_ours": ratio(predecessor, both)},
        "median_seconds": {way: round(float(np.median(found)), 3) for way, found in times.items()},
        "peak_megabytes": {way: round(bytes / 2**20, 1) for way, bytes in peaks.items()},
    }
    record(result, given.json)


if __name__ == "__main__":
    main()
