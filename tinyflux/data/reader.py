"""Reads a run's samples from its caches, step by step.

An optimizer step trains on the next ``batch_size`` positions of the run (see
``tinyflux.data.order``), cut into neighbouring parts of nearly equal size for the workers
and their micro-batches.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from tinyflux.data.batches import HeldOut, Place, StepData, TrainBatch
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.order import Rows, SampleOrder, Stream, cut, variant_draws

# More held-out samples would cost time and hardly sharpen the figure: each counts at 8 times.
MAX_HELD_OUT = 256
HELD_OUT_BATCH = 32


class StepReader:
    """Reads what optimizer steps train on, for one worker of many or for a plain ``Trainer``.

    Args:
        held_out: ``[rows]`` bool, the rows of ``data`` not to train on.
        batch_size: samples of a step over all workers.
        accumulation: micro-batches that each worker cuts its part of a step into.
        start: position of the run at which this order begins. part: see :class:`SampleOrder`.

    Attributes:
        data: the caches that are read.

    Raises:
        CacheError: no rows are left to train on.
    """

    def __init__(
        self,
        data: CacheMixture,
        held_out: np.ndarray,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        start: int = 0,
        part: Sequence[int | str] = (),
    ):
        self.data, self._batch_size, self._accumulation = data, batch_size, accumulation
        self._seed, self._start = seed, start
        self._order = order_of(data, held_out, batch_size, seed, part)

    @property
    def pass_length(self) -> int:
        """Positions of whole steps in which one pass over the rows is complete."""
        return -(-self._order.count // self._batch_size) * self._batch_size

    @property
    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """See :attr:`CacheMixture.null_text`."""
        return self.data.null_text

    @property
    def t_buckets(self) -> Tensor:
        """``[K]`` times of the teachers' features; empty without teachers."""
        return self.data.t_buckets

    def after(self, place: Place) -> Iterator[StepData]:
        """What a run in one process trains on: the same as all workers of a larger one."""
        return self.steps(place.samples_seen)

    def steps(self, samples_seen: int = 0, rank: int = 0, world: int = 1) -> Iterator[StepData]:
        """What worker ``rank`` of ``world`` trains on, without end, from ``samples_seen`` on."""
        while True:
            step = self.step(samples_seen, rank, world)
            samples_seen = step.samples_seen
            yield step

    def step(self, samples_seen: int, rank: int = 0, world: int = 1) -> StepData:
        """The step that follows ``samples_seen``, as of :meth:`steps`."""
        whole = range(samples_seen, samples_seen + self._batch_size)
        mine = cut(whole, world)[rank]
        batch = TrainBatch.from_dict(self._read(mine), torch.arange(mine.start, mine.stop))
        parts = cut(mine, self._accumulation)
        return StepData(
            [batch[part.start - mine.start : part.stop - mine.start] for part in parts],
            whole.stop,
            epoch=(whole.stop - self._start) // self._order.count,
            epoch_batches=0,
            size=self._batch_size,
        )

    def _read(self, positions: range) -> dict[str, Tensor]:
        """The samples at these positions of one global batch, each in one of its variants."""
        rows = self._order.rows(range(positions.start - self._start, positions.stop - self._start))
        if not self.data.has_variants:
            return self.data.read(rows, as_stored=True)
        return self.data.read(rows, as_stored=True, draws=variant_draws(self._seed, positions))

    def sol_examples(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Sol's features of the first samples of a run that have them.

        Returns:
            ``[N, K, 4]`` and ``[N, K, s, s]`` with N of at least ``count``, or all that there are
            in one pass; None where no sample has them.
        """
        parts: list[tuple[Tensor, Tensor]] = []
        position = found = 0
        while position < self._order.count and found < count:
            rows = self._order.rows(range(position, position + self._batch_size))
            batch = self.data.read(rows, groups=("sol",))
            position += self._batch_size
            if "sol_stats" in batch:
                has_sol = batch.get("sol_mask", torch.ones(len(rows), dtype=torch.bool))
                parts.append((batch["sol_stats"][has_sol], batch["sol_spatial"][has_sol]))
                found += int(has_sol.sum())
        if not found:
            return None
        stats, spatial = (torch.cat(column) for column in zip(*parts, strict=True))
        return stats, spatial


def order_of(
    data: CacheMixture,
    held_out: np.ndarray,
    batch_size: int,
    seed: int,
    part: Sequence[int | str] = (),
) -> SampleOrder:
    """The order of the rows that are not held out (``[rows]`` bool); see :class:`SampleOrder`."""
    sizes: dict[tuple[int, int], list[Stream]] = {}
    chosen = ~held_out
    for index, source in enumerate(data.sources):
        runs: dict[tuple[int, int], list[range]] = {}
        for grid, run in data.grids(index):
            runs.setdefault(grid, []).append(run)
        rows = {grid: Rows(of_grid, chosen) for grid, of_grid in runs.items()}
        total = sum(map(len, rows.values()))
        weight = (
            Fraction(source.weight).limit_denominator(1_000_000) if len(data.sources) > 1 else 1
        )
        for grid, own in rows.items():
            if total:
                share = weight * Fraction(len(own), total)
                sizes.setdefault(grid, []).append(Stream(own, share))
    return SampleOrder([sizes[grid] for grid in sorted(sizes)], batch_size, seed, part)


def read_held_out(data: CacheMixture, held_out: np.ndarray) -> HeldOut:
    """Up to ``MAX_HELD_OUT`` of the held-out rows, those with the smallest keys."""
    chosen = data.smallest_keys(held_out, MAX_HELD_OUT)
    parts: list[list[tuple[str, int]]] = []
    for source in range(len(data.sources)):
        for grid in sorted({grid for grid, _ in data.grids(source)}):
            runs = [run for other, run in data.grids(source) if other == grid]
            group = [(key, row) for key, row in chosen if any(row in run for run in runs)]
            parts += [
                group[at : at + HELD_OUT_BATCH] for at in range(0, len(group), HELD_OUT_BATCH)
            ]
    zeros = [torch.zeros(len(part), dtype=torch.int64) for part in parts]
    batches = [data.read([row for _, row in part]) for part in parts]
    return HeldOut(
        [TrainBatch.from_dict(*pair) for pair in zip(batches, zeros, strict=True)],
        [[key for key, _ in part] for part in parts],
        data.null_text,
    )
