"""Which keys have been seen, for more of them than a Python set can hold."""

from collections.abc import Sequence

import numpy as np

# Keys in the largest sorted run: merging two of half the size copies them once.
LARGEST_RUN = 2**24


class KeySet:
    """A set of keys (32 hex digits) in 16 bytes each; a Python set needs some 200.

    Keys lie in sorted runs, as in a log-structured merge tree: a batch is a run, and runs of like
    size are merged. A question is a binary search in each of the few runs.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # halves, sorted by the first

    def add(self, keys: Sequence[str]) -> list[bool]:
        """Add ``keys``; whether each was there, or earlier in ``keys``, already."""
        if not keys:
            return []
        halves = np.frombuffer(bytes.fromhex("".join(keys)), dtype=">u8").reshape(-1, 2)
        first, second = halves.astype(np.uint64).T
        earliest = {key: place for place, key in reversed(list(enumerate(keys)))}
        known = np.ones(len(keys), dtype=bool)
        known[list(earliest.values())] = False
        for run in self._runs:
            known |= _contains(run, first, second)
        self._push(_sorted(first[~known], second[~known]))
        flags: list[bool] = known.tolist()
        return flags

    def _push(self, run: tuple[np.ndarray, np.ndarray]) -> None:
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]) < LARGEST_RUN:
            last = self._runs.pop()
            run = _sorted(np.concatenate([last[0], run[0]]), np.concatenate([last[1], run[1]]))
        if len(run[0]):
            self._runs.append(run)


def _sorted(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(first, kind="stable")
    return first[order], second[order]


def _contains(
    run: tuple[np.ndarray, np.ndarray], first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Which keys are in ``run``, ``[n]`` bool."""
    low, high = np.searchsorted(run[0], first), np.searchsorted(run[0], first, side="right")
    found = np.zeros(len(first), dtype=bool)
    # Two keys with one first half are next to never seen, so these are the keys themselves.
    for place in np.flatnonzero(high > low):
        found[place] = (run[1][low[place] : high[place]] == second[place]).any()
    return found
