"""Which worker trains on which samples, and reading them.

A run is one long stream of positions 0, 1, 2, ... Each pass over the data takes the next ``count``
positions in an order shuffled by (seed, pass). An optimizer step trains on the next ``batch_size``
positions, cut into neighbouring parts of nearly equal size for the workers and their micro-batches.
So the place in the data is one number, and it means the same on any number of workers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
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

    def grids(self) -> list[tuple[tuple[int, int], range]]: ...

    def read(self, indices: Sequence[int]) -> Mapping[str, Tensor | None]: ...


class SampleOrder:
    """From positions to rows of the data: a real shuffle of all of it, each pass its own.

    A global batch holds pictures of one size. The rows of each size form a stream of their own,
    pass after pass, and a pass over the data takes from each stream its due number of batches, in
    an order that is shuffled as well. A stream's batch may reach from one pass into the next, so no
    row is left out or comes more often than another.

    The whole permutation is in memory (8 bytes a row); an order with bounded memory and sequential
    reads can take its place behind :meth:`rows`.

    Args:
        groups: rows by size.
        batch_size: of the global batch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int):
        self._groups = [torch.tensor(rows) for rows in groups if len(rows)]
        self.count = sum(len(rows) for rows in self._groups)
        if not self.count:
            raise CacheError("the cache has no samples to train on")
        self._batch_size, self._seed = batch_size, seed
        self._orders: dict[tuple[int, int], Tensor] = {}
        self._batches: tuple[int, list[tuple[int, int]]] = (-1, [])

    def rows(self, positions: range) -> list[int]:
        """Rows at these positions of one global batch."""
        number = positions.start // self._batch_size
        group, batch = self._batch(number)
        shift = (batch - number) * self._batch_size
        rows = self._groups[group]
        return [self._row(group, rows, position + shift) for position in positions]

    def _row(self, group: int, rows: Tensor, place: int) -> int:
        index, at = divmod(place, len(rows))
        if (group, index) not in self._orders:
            # A batch can touch the end of one pass and the start of the next.
            kept = {k: v for k, v in self._orders.items() if k[0] != group or k[1] >= index - 1}
            source = generator(self._seed, "order", group, index)
            self._orders = {**kept, (group, index): torch.randperm(len(rows), generator=source)}
        return int(rows[self._orders[group, index][at]])

    def _batch(self, number: int) -> tuple[int, int]:
        """The size of the run's batch ``number``, and which batch of that size's stream it is."""
        if len(self._groups) == 1:
            return 0, number
        index = max(0, number * self._batch_size // self.count - 1)
        while self._before(index + 1) <= number:
            index += 1
        if self._batches[0] != index:
            due = [
                (group, batch)
                for group in range(len(self._groups))
                for batch in range(self._due(group, index), self._due(group, index + 1))
            ]
            shuffle = torch.randperm(len(due), generator=generator(self._seed, "batches", index))
            self._batches = (index, [due[at] for at in shuffle.tolist()])
        return self._batches[1][number - self._before(index)]

    def _due(self, group: int, passes: int) -> int:
        """Whole batches of a size in so many passes."""
        return passes * len(self._groups[group]) // self._batch_size

    def _before(self, passes: int) -> int:
        return sum(self._due(group, passes) for group in range(len(self._groups)))


def rows_by_size(dataset: Rows, rows: Sequence[int]) -> list[list[int]]:
    """``rows`` (ascending) by the height and width of their latents."""
    found: dict[tuple[int, int], list[int]] = {}
    wanted = np.asarray(rows, dtype=np.int64)
    for grid, run in dataset.grids():
        first, last = np.searchsorted(wanted, [run.start, run.stop])
        if first < last:
            found.setdefault(grid, []).extend(wanted[first:last].tolist())
    return [found[grid] for grid in sorted(found)]


def split_rows(pictures: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, by a hash of each row's picture alone.

    All captions of a picture are on the same side.
    """
    train: list[int] = []
    held_out: list[int] = []
    for row, key in enumerate(pictures):
        digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"held-out").digest()
        share = int.from_bytes(digest, "little") / 2**64
        (held_out if share < fraction else train).append(row)
    return train, held_out


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
    order = SampleOrder(rows_by_size(dataset, rows), config.batch_size, config.seed)
    while True:
        batch_range = range(samples_seen, samples_seen + config.batch_size)
        mine = cut(batch_range, world_size)[rank]
        data = dataset.read(order.rows(mine))
        batch = TrainBatch.from_dict(data, torch.arange(mine.start, mine.stop))
        samples_seen += config.batch_size
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


def read_held_out(dataset: Rows, rows: Sequence[int]) -> HeldOut:
    """Up to ``MAX_HELD_OUT`` of the held-out rows, those with the smallest keys."""
    keys = dataset.keys()
    chosen = sorted(rows, key=lambda row: keys[row])[:MAX_HELD_OUT]
    parts = [
        group[at : at + HELD_OUT_BATCH]
        for group in rows_by_size(dataset, sorted(chosen))
        for at in range(0, len(group), HELD_OUT_BATCH)
    ]
    return HeldOut(
        [TrainBatch.from_dict(dataset.read(part), torch.zeros(len(part)).long()) for part in parts],
        [[keys[row] for row in part] for part in parts],
    )
