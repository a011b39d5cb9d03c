"""Which sample stands at which position of a run.

A run is one long stream of positions 0, 1, 2, ... What stands at a position depends on the seed and
the data alone. So the place in the data is one number, and it means the same on any number of
workers.

Global batches are dealt to the sizes of pictures, and a size's samples to the caches of a mixture,
as evenly as whole numbers allow. Each pair of a size and a cache has a stream of its rows, pass
after pass, each pass another shuffle.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import lcm

import numpy as np
import torch

from tinyflux.errors import CacheError
from tinyflux.util.seeding import generator

# Rows that lie side by side are read together: BLOCK of them move as one, WINDOW blocks are mixed.
BLOCK, WINDOW = 64, 64
SELECT = 4096


class Rows:
    """Chosen rows of a dataset, in ascending order, found by their index.

    Memory is that of ``chosen``, one byte a row, and of 8 bytes for each 4,096 rows.

    Args:
        runs: ranges of rows. chosen: ``[rows]`` bool over the whole dataset.
    """

    def __init__(self, runs: Iterable[range], chosen: np.ndarray):
        self._chosen = chosen
        starts, stops = [], []
        for run in runs:
            for start in range(run.start, run.stop, SELECT):
                starts.append(start)
                stops.append(min(start + SELECT, run.stop))
        self._starts, self._stops = np.array(starts, np.int64), np.array(stops, np.int64)
        counts = [int(chosen[a:b].sum()) for a, b in zip(starts, stops, strict=True)]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Rows at these indices ``[n]``."""
        piece_of = np.searchsorted(self._ends, indices, side="right")
        rows = np.empty(len(indices), np.int64)
        for piece in np.unique(piece_of):
            here = piece_of == piece
            start, stop = self._starts[piece], self._stops[piece]
            before = self._ends[piece - 1] if piece else 0
            rows[here] = start + np.flatnonzero(self._chosen[start:stop])[indices[here] - before]
        return rows


class Shuffle:
    """A shuffle of ``count`` things in bounded memory, near ones staying near for the disk's sake.

    The things, turned by a random amount, are cut into blocks of 64 neighbours; the blocks are
    shuffled (a Feistel permutation, so none is stored), and each 4,096 samples that follow are
    shuffled among themselves. Up to 4,096 things this is a plain shuffle. Above, a batch draws from
    64 places of the whole dataset, and blocks are cut elsewhere and meet others in each pass.
    """

    def __init__(self, count: int, *seed: int | str):
        self._count, self._seed = count, seed
        random = generator(*seed)
        self._turn = int(torch.randint(count, (), generator=random))
        self._keys = torch.randint(2**32, (4,), generator=random).tolist()
        self._blocks = count // BLOCK  # the things behind the last whole block follow it
        self._latest: tuple[int, np.ndarray] | None = None

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places ``[n]``, each from 0 to ``count`` - 1."""
        window = np.minimum(places // (BLOCK * WINDOW), max(0, self._windows - 1))
        found = np.empty(len(places), np.int64)
        for number in np.unique(window):
            here = window == number
            members = self._window(int(number))
            found[here] = members[places[here] - number * BLOCK * WINDOW]
        return found

    @property
    def _windows(self) -> int:
        return -(-self._blocks // WINDOW)

    def _window(self, number: int) -> np.ndarray:
        """The things of one window, shuffled."""
        if self._latest is not None and self._latest[0] == number:
            return self._latest[1]
        first = number * WINDOW
        last = min(self._blocks, first + WINDOW)
        blocks = self._permuted(np.arange(first, last)) if last > first else np.zeros(0, np.int64)
        members = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        if last == self._blocks:
            members = np.concatenate([members, np.arange(self._blocks * BLOCK, self._count)])
        source = generator(*self._seed, "window", number)
        members = members[torch.randperm(len(members), generator=source).numpy()]
        self._latest = (number, (members + self._turn) % self._count)
        return self._latest[1]

    def _permuted(self, blocks: np.ndarray) -> np.ndarray:
        """Where these blocks come from: a Feistel network, walked until it is back in range."""
        half = max(1, (max(1, self._blocks - 1).bit_length() + 1) // 2)
        values = self._rounds(blocks, half)
        while (outside := values >= self._blocks).any():
            values[outside] = self._rounds(values[outside], half)
        return values

    def _rounds(self, values: np.ndarray, half: int) -> np.ndarray:
        low = np.uint64(2**half - 1)
        left, right = values.astype(np.uint64) >> np.uint64(half), values.astype(np.uint64) & low
        for key in self._keys:
            mixed = (right + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(40)
            left, right = right, left ^ (mixed & low)
        joined: np.ndarray = (left << np.uint64(half)) | right
        return joined.astype(np.int64)


def deal(position: int, shares: Sequence[int]) -> tuple[int, int]:
    """To whom ``position`` of a stream goes, and how many before it went there.

    One after the other takes its share of what is left, each evenly spread, so that of the first
    ``n`` positions each has got ``n * share / sum(shares)`` within 2 (within 1 for two shares), and
    exactly its share of each ``sum(shares)`` of them.
    """
    rest = sum(shares)
    for who, share in enumerate(shares[:-1]):
        before = position * share // rest
        if (position + 1) * share // rest > before:
            return who, before
        position -= before
        rest -= share
    return len(shares) - 1, position


def variant_draws(seed: int, positions: range) -> np.ndarray:
    """What decides on the variant of the picture at each position, ``[n]`` from 0 to below 1."""
    sources = (generator(seed, "variant", position) for position in positions)
    draws = [torch.rand((), dtype=torch.float64, generator=source).item() for source in sources]
    return np.array(draws)


def cut(whole: range, parts: int) -> list[range]:
    """``whole`` in so many neighbouring parts, the first ones longer by one where need be."""
    size, longer = divmod(len(whole), parts)
    ends = [whole.start + at * size + min(at, longer) for at in range(parts + 1)]
    return [range(*pair) for pair in pairwise(ends)]


@dataclass
class Stream:
    """Rows of one size in one cache, and what part of the run's samples they are."""

    rows: Rows
    share: Fraction


class SampleOrder:
    """From positions to rows.

    Args:
        sizes: for each size of pictures, its streams.
        batch_size: of the global batch.
        part: what part of the run has this order, where there are several; each has its shuffles.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[Stream]],
        batch_size: int,
        seed: int,
        part: Sequence[int | str] = (),
    ):
        self._sizes = [[s for s in streams if len(s.rows)] for streams in sizes]
        self._sizes = [streams for streams in self._sizes if streams]
        self.count = sum(len(stream.rows) for streams in self._sizes for stream in streams)
        if not self.count:
            raise CacheError("the cache has no samples to train on")
        self._batch_size, self._seed, self._part = batch_size, seed, tuple(part)
        self._size_shares = _whole(
            [sum((s.share for s in streams), Fraction()) for streams in self._sizes]
        )
        self._shares = [_whole([s.share for s in streams]) for streams in self._sizes]
        self._shuffle = lru_cache(maxsize=4 * sum(map(len, self._sizes)))(self._shuffle_of)

    def rows(self, positions: range) -> list[int]:
        """Rows at these positions of one global batch."""
        number = positions.start // self._batch_size
        size, batch = deal(number, self._size_shares)
        first = batch * self._batch_size - number * self._batch_size
        dealt = np.array([deal(at + first, self._shares[size]) for at in positions], np.int64)
        rows = np.empty(len(dealt), np.int64)
        for which in np.unique(dealt[:, 0]):
            here = dealt[:, 0] == which
            stream = self._sizes[size][which]
            passes, places = np.divmod(dealt[here, 1], len(stream.rows))
            for index in np.unique(passes):
                now = passes == index
                places[now] = self._shuffle(size, int(which), int(index))[places[now]]
            rows[here] = stream.rows[places]
        numbers: list[int] = rows.tolist()
        return numbers

    def _shuffle_of(self, size: int, which: int, number_of_pass: int) -> Shuffle:
        count = len(self._sizes[size][which].rows)
        return Shuffle(count, self._seed, "order", *self._part, size, which, number_of_pass)


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """The shares as whole numbers of the same proportions."""
    scale = lcm(*(share.denominator for share in shares))
    return [int(share * scale) for share in shares]
