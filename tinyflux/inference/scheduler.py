"""Who shares the next forward: a fair order for samples of many sizes and many steps.

Two rules, and no sample ever holds the model longer than one evaluation:

*Among sizes*, which cannot share a forward, the turn goes to the size whose samples have had the
least of the model so far: a forward's seconds, split among its samples (start-time fair queueing,
Goyal, Vin & Cheng 1996). Sizes whose forwards cost alike take turns; a cheap one gets more of them.
A size that comes anew starts where the one in service stands, so it neither waits for others to
finish nor claims the past.

*Within a size*, a forward has ``max_batch`` places. They go to the samples that would be finished
first if all shared the places equally (the fair sojourn protocol, Friedman & Henderson 2003). So a
short sample passes long ones, samples that are alike are served in order of arrival, and nobody
starves, however many short ones come: a sample is finished no later than under equal sharing, give
or take its own evaluations.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass
class _Place:
    """A sample's place in the order.

    Attributes:
        end: its size's ``shared`` at which it would be finished under equal sharing.
        arrival: breaks ties.
        left: evaluations still wanted.
    """

    end: float
    arrival: int
    left: int
    held: bool = False


@dataclass
class _Size(Generic[T]):
    """The samples of one size.

    Attributes:
        clock: seconds of the model that each of its samples has had.
        shared: evaluations that a sample would have had under equal sharing since the size came.
        ends: the ``end`` of each sample that would not be finished yet under equal sharing.
    """

    clock: float
    shared: float = 0.0
    places: dict[T, _Place] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)

    def ready(self) -> list[T]:
        return [item for item, place in self.places.items() if not place.held]


class Scheduler(Generic[T]):
    """Samples that want evaluations, and whose turn it is. Not thread-safe.

    Args:
        max_batch: samples of a forward.
    """

    def __init__(self, max_batch: int):
        self.max_batch = max_batch
        self._sizes: dict[Hashable, _Size[T]] = {}
        self._size_of: dict[T, Hashable] = {}
        self._left: dict[Hashable, float] = {}  # clocks of sizes that are gone but were ahead
        self._now, self._arrivals = 0.0, 0

    def __len__(self) -> int:
        return len(self._size_of)

    def add(self, item: T, size: Hashable, evaluations: int) -> None:
        """``item`` wants ``evaluations`` forwards, beside others of an equal ``size``."""
        if size not in self._sizes:
            self._sizes[size] = _Size(max(self._now, self._left.pop(size, 0.0)))
        group = self._sizes[size]
        place = _Place(group.shared + evaluations, self._arrivals, evaluations)
        group.places[item] = place
        group.ends.append(place.end)
        self._size_of[item] = size
        self._arrivals += 1

    def next(self) -> list[T]:
        """The samples of the next forward, of one size; empty if none can go."""
        groups = [group for group in self._sizes.values() if group.ready()]
        if not groups:
            return []
        group = min(groups, key=lambda group: group.clock)
        self._now = group.clock
        places = group.places

        def order(item: T) -> tuple[float, int]:
            return places[item].end, places[item].arrival

        return nsmallest(self.max_batch, group.ready(), key=order)

    def charge(self, items: list[T], seconds: float) -> None:
        """Account for the forward of ``items`` that took ``seconds``; those at their end leave."""
        group = self._sizes[self._size_of[items[0]]]
        group.clock += seconds / len(items)
        group.shared += min(1.0, self.max_batch / max(len(group.ends), 1))
        group.ends = [end for end in group.ends if end > group.shared]
        for item in items:
            group.places[item].left -= 1
            if not group.places[item].left:
                self.remove(item)

    def remove(self, item: T) -> None:
        """``item`` wants no more; nothing happens if it is not there."""
        if item not in self._size_of:
            return
        size = self._size_of.pop(item)
        group = self._sizes[size]
        place = group.places.pop(item)
        if place.left and place.end in group.ends:
            group.ends.remove(place.end)
        if not group.places:
            del self._sizes[size]
            self._left = {key: clock for key, clock in self._left.items() if clock > self._now}
            if group.clock > self._now:
                self._left[size] = group.clock

    def hold(self, item: T, held: bool) -> None:
        """Pass ``item`` over, or no longer; it keeps its place in the order."""
        if item in self._size_of:
            group = self._sizes[self._size_of[item]]
            group.places[item].held = held
            group.clock = max(group.clock, self._now)
