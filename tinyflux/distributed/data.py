"""Which worker trains on which samples, and reading them.

An optimizer step trains on the next ``batch_size`` positions of the run (see
``tinyflux.data.order``), cut into neighbouring parts of nearly equal size for the workers
and their micro-batches.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tinyflux.data.mixture import CacheMixture
from tinyflux.data.order import Rows, SampleOrder, Stream
from tinyflux.errors import ConfigError
from tinyflux.model.experts import SolUnits
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.loop import StepData
from tinyflux.trainer.sharding import rank_and_world
from tinyflux.trainer.step import SOL_SAMPLES, TrainBatch
from tinyflux.trainer.validation import HeldOut

# More held-out samples would cost time and hardly sharpen the figure: each counts at 8 times.
MAX_HELD_OUT = 256
HELD_OUT_BATCH = 32


def order_of(data: CacheMixture, held_out: np.ndarray, batch_size: int, seed: int) -> SampleOrder:
    """The order of the rows that are not held out (``[rows]`` bool)."""
    sizes: dict[tuple[int, int], list[Stream]] = {}
    chosen = ~held_out
    for index, source in enumerate(data.sources):
        runs: dict[tuple[int, int], list[range]] = {}
        for grid, run in data.grids(index):
            runs.setdefault(grid, []).append(run)
        rows = {grid: Rows(found, chosen) for grid, found in runs.items()}
        total = sum(map(len, rows.values()))
        weight = (
            Fraction(source.weight).limit_denominator(1_000_000) if len(data.sources) > 1 else 1
        )
        for grid, part in rows.items():
            if total:
                share = weight * Fraction(len(part), total)
                sizes.setdefault(grid, []).append(Stream(part, share))
    return SampleOrder([sizes[grid] for grid in sorted(sizes)], batch_size, seed)


def check_batch_size(config: TrainerConfig, num_workers: int) -> None:
    """Refuse a global batch with too few samples for its parts with a :class:`ConfigError`."""
    parts = num_workers * config.gradient_accumulation
    if config.batch_size < parts:
        raise ConfigError(
            f"trainer.batch_size = {config.batch_size} must be at least workers.num_workers "
            f"* trainer.gradient_accumulation = {num_workers} * {config.gradient_accumulation} "
            f"= {parts}"
        )


def cut(whole: range, parts: int) -> list[range]:
    """``whole`` in so many neighbouring parts, the first ones longer by one where need be."""
    size, longer = divmod(len(whole), parts)
    ends = [whole.start + at * size + min(at, longer) for at in range(parts + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def worker_steps(
    data: CacheMixture,
    held_out: np.ndarray,
    config: TrainerConfig,
    rank: int,
    world_size: int,
    samples_seen: int,
) -> Iterator[StepData]:
    """What a worker trains on, step by step and without end, from ``samples_seen`` on.

    Args:
        held_out: ``[rows]`` bool, the rows of ``data`` not to train on.
    """
    order = order_of(data, held_out, config.batch_size, config.seed)
    while True:
        whole = range(samples_seen, samples_seen + config.batch_size)
        mine = cut(whole, world_size)[rank]
        batch = TrainBatch.from_dict(
            data.read(order.rows(mine), as_stored=True), torch.arange(mine.start, mine.stop)
        )
        samples_seen = whole.stop
        yield StepData(
            [
                batch[part.start - mine.start : part.stop - mine.start]
                for part in cut(mine, config.gradient_accumulation)
            ],
            samples_seen,
            epoch=samples_seen // order.count,
            epoch_batches=0,
            size=config.batch_size,
        )


def measure_sol(
    units: SolUnits, data: CacheMixture, held_out: np.ndarray, config: TrainerConfig
) -> None:
    """Measure Sol's units on the samples that the run trains on first; called by all workers.

    The first worker reads, and tells the others.
    """
    rank, world_size = rank_and_world()
    if rank == 0:
        order = order_of(data, held_out, config.batch_size, config.seed)
        parts: list[tuple[Tensor, Tensor]] = []
        position = count = 0
        while position < order.count and count < SOL_SAMPLES:
            rows = order.rows(range(position, position + config.batch_size))
            batch = data.read(rows, groups=("sol",))
            position += config.batch_size
            if "sol_stats" in batch:
                there = batch.get("sol_mask", torch.ones(len(rows), dtype=torch.bool))
                parts.append((batch["sol_stats"][there], batch["sol_spatial"][there]))
                count += int(there.sum())
        if count:
            stats, spatial = (torch.cat(column) for column in zip(*parts, strict=True))
            device = units.map_std.device
            units.measure(stats.to(device), spatial.to(device), data.t_buckets)
    if world_size > 1:
        for buffer in units.buffers():
            dist.broadcast(buffer, 0)


def read_held_out(data: CacheMixture, held_out: np.ndarray) -> HeldOut:
    """Up to ``MAX_HELD_OUT`` of the held-out rows, those with the smallest keys."""
    chosen = data.smallest_keys(held_out, MAX_HELD_OUT)
    parts: list[list[tuple[str, int]]] = []
    for source in range(len(data.sources)):
        for grid in sorted({grid for grid, _ in data.grids(source)}):
            runs = [run for found, run in data.grids(source) if found == grid]
            group = [(key, row) for key, row in chosen if any(row in run for run in runs)]
            parts += [
                group[at : at + HELD_OUT_BATCH] for at in range(0, len(group), HELD_OUT_BATCH)
            ]
    zeros = [torch.zeros(len(part), dtype=torch.int64) for part in parts]
    batches = [data.read([row for _, row in part]) for part in parts]
    return HeldOut(
        [TrainBatch.from_dict(*pair) for pair in zip(batches, zeros, strict=True)],
        [[key for key, _ in part] for part in parts],
    )
