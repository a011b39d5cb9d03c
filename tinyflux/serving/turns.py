"""Who shares the next forward: a fair order for samples of many sizes and many steps.

Two rules, and no sample ever holds the model longer than one evaluation:

*Among sizes*, which cannot share a forward, the turn goes to the size whose samples have had the
least of the model so far: a forward's seconds, split among its samples (start-time fair queueing,
Goyal, Vin & Cheng 1996). Sizes whose forwards cost alike take turns; a cheap one gets more of them.
A size that comes anew starts where the one in service stands, so it neither waits for others to
finish nor claims the past.

*Within a size*, a forward has ``max_batch`` places. They go to the samples that would be finished
first if all shared the places equally (the fair sojourn protocol, Friedman & Henderson 2003). So a
short sample passes long ones, samples that are alike are served in order of arrival, and none
finishes later than under equal sharing: nobody starves, however many short ones come.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass
class _Size(Generic[T]):
    """The samples of one size.

    Attributes:
        clock: seconds of the model that each of its samples has had.
        shared: evaluations that a sample would have had under equal sharing since the size came.
        ends: ``shared`` at which a sample would be finished, and its number of arrival.
        held: samples that take no turn for now.
    """

    clock: float
    shared: float = 0.0
    ends: dict[T, tuple[float, int]] = field(default_factory=dict)
    held: set[T] = field(default_factory=set)

    @property
    def ready(self) -> list[T]:
        return [item for item in self.ends if item not in self.held]


class Turns(Generic[T]):
    """Samples that want evaluations, and whose turn it is. Not thread-safe.

    Args:
        max_batch: samples of a forward.
    """

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self._sizes: dict[Hashable, _Size[T]] = {}
        self._of: dict[T, Hashable] = {}
        self._left: dict[Hashable, float] = {}  # clocks of sizes that are gone but were ahead
        self._now, self._arrivals = 0.0, 0

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, item: T) -> bool:
        return item in self._of

    def add(self, item: T, size: Hashable, evaluations: int) -> None:
        """``item`` wants ``evaluations`` forwards, beside others of an equal ``size``."""
        if size not in self._sizes:
            self._sizes[size] = _Size(max(self._now, self._left.pop(size, 0.0)))
        group = self._sizes[size]
        group.ends[item] = (group.shared + evaluations, self._arrivals)
        self._of[item] = size
        self._arrivals += 1

    def remove(self, item: T) -> None:
        """``item`` wants no more; nothing happens if it is not there."""
        if item not in self._of:
            return
        size = self._of.pop(item)
        group = self._sizes[size]
        del group.ends[item]
        group.held.discard(item)
        if not group.ends:
            del self._sizes[size]
            self._left = {key: clock for key, clock in self._left.items() if clock > self._now}
            if group.clock > self._now:
                self._left[size] = group.clock

    def hold(self, item: T) -> None:
        """Pass ``item`` over until it is released; it keeps its place in the order."""
        if item in self._of:
            self._sizes[self._of[item]].held.add(item)

    def release(self, item: T) -> None:
        """End :meth:`hold`; nothing happens if ``item`` is not held or not there."""
        if item in self._of:
            group = self._sizes[self._of[item]]
            group.held.discard(item)
            group.clock = max(group.clock, self._now)

    def next(self) -> list[T]:
        """The samples of the next forward, of one size; empty if none can go."""
        groups = [group for group in self._sizes.values() if group.ready]
        if not groups:
            return []
        group = min(groups, key=lambda group: group.clock)
        self._now = group.clock
        return nsmallest(self.max_batch, group.ready, key=group.ends.__getitem__)

    def charge(self, items: list[T], seconds: float) -> None:
        """Account for the forward of ``items``, all still there, that took ``seconds``."""
        group = self._sizes[self._of[items[0]]]
        group.clock += seconds / len(items)
        group.shared += min(1.0, self.max_batch / len(group.ends))
