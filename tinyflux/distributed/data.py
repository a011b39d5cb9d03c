"""Which worker trains on which samples, and reading them.

A run is one long stream of positions 0, 1, 2, ... Each pass over the data takes the next ``count``
positions in an order shuffled by (seed, pass). An optimizer step trains on the next ``batch_size``
positions, cut into equal neighbouring parts for the workers and their micro-batches. So the place
in the data is one number, and it means the same on any number of workers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tinyflux.errors import CacheError, ConfigError
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.loop import StepData
from tinyflux.trainer.step import TrainBatch
from tinyflux.trainer.validation import HeldOut
from tinyflux.util.seeding import generator

# More held-out samples would cost time and hardly sharpen the figure: each counts at 8 times.
MAX_HELD_OUT = 256
HELD_OUT_BATCH = 32


class Rows(Protocol):
    """What is needed of a CachedDataset."""

    def __len__(self) -> int: ...

    def keys(self) -> list[str]: ...

    def read(self, indices: Sequence[int]) -> Mapping[str, Tensor | None]: ...


class SampleOrder:
    """From positions to rows of the data: a real shuffle of all of it, each pass its own.

    The whole permutation is in memory (8 bytes a row); an order with bounded memory and sequential
    reads can take its place behind :meth:`rows`.
    """

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise CacheError("the cache has no samples to train on")
        self.count, self._seed = count, seed
        self._passes: dict[int, Tensor] = {}

    def rows(self, positions: range) -> list[int]:
        """Rows in ``[0, count)`` at these positions."""
        return [int(self._order(p // self.count)[p % self.count]) for p in positions]

    def _order(self, index: int) -> Tensor:
        if index not in self._passes:
            # A batch can touch the end of one pass and the start of the next.
            self._passes = {k: v for k, v in self._passes.items() if k >= index - 1}
            source = generator(self._seed, "order", index)
            self._passes[index] = torch.randperm(self.count, generator=source)
        return self._passes[index]


def split_rows(keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, by a hash of the key alone."""
    train: list[int] = []
    held_out: list[int] = []
    for row, key in enumerate(keys):
        digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"held-out").digest()
        share = int.from_bytes(digest, "little") / 2**64
        (held_out if share < fraction else train).append(row)
    return train, held_out


def check_batch_size(config: TrainerConfig, num_workers: int) -> None:
    """Refuse a global batch that cannot be cut evenly with a :class:`ConfigError`."""
    parts = num_workers * config.gradient_accumulation
    if config.batch_size % parts:
        raise ConfigError(
            f"trainer.batch_size = {config.batch_size} must be a multiple of workers.num_workers "
            f"* trainer.gradient_accumulation = {num_workers} * {config.gradient_accumulation} "
            f"= {parts}"
        )


def worker_positions(start: int, batch_size: int, rank: int, world_size: int) -> range:
    """This worker's positions of the global batch that begins at ``start``."""
    share = batch_size // world_size
    return range(start + rank * share, start + (rank + 1) * share)


def worker_steps(
    dataset: Rows,
    rows: Sequence[int],
    config: TrainerConfig,
    rank: int,
    world_size: int,
    samples_seen: int,
) -> Iterator[StepData]:
    """What a worker trains on, step by step and without end, from ``samples_seen`` on.

    Args:
        rows: the rows of ``dataset`` to train on.
    """
    order = SampleOrder(len(rows), config.seed)
    while True:
        mine = worker_positions(samples_seen, config.batch_size, rank, world_size)
        data = dataset.read([rows[row] for row in order.rows(mine)])
        batch = TrainBatch.from_dict(data, torch.arange(mine.start, mine.stop))
        size = len(mine) // config.gradient_accumulation
        samples_seen += config.batch_size
        yield StepData(
            [batch[at : at + size] for at in range(0, len(mine), size)],
            samples_seen,
            epoch=samples_seen // order.count,
            epoch_batches=0,
        )


def read_held_out(dataset: Rows, rows: Sequence[int]) -> HeldOut:
    """Up to ``MAX_HELD_OUT`` of the held-out rows, those with the smallest keys."""
    keys = dataset.keys()
    chosen = sorted(rows, key=lambda row: keys[row])[:MAX_HELD_OUT]
    parts = [chosen[at : at + HELD_OUT_BATCH] for at in range(0, len(chosen), HELD_OUT_BATCH)]
    return HeldOut(
        [TrainBatch.from_dict(dataset.read(part), torch.zeros(len(part)).long()) for part in parts],
        [[keys[row] for row in part] for part in parts],
    )
