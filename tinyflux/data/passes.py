"""Which shards each pass of a run reads, where caches grow while it trains.

A run keeps a list of shards for each cache, which only gets longer: what has been committed is
taken in between two passes. So the sample at a position is a matter of the seed, the position and
the lists, and the lists are kept with the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """Passes, one after the other, over the same shards.

    Attributes:
        start: position of the first one's first sample.
        number: of the first one; passes are counted from 0.
        counts: how many shards of each cache's list they read.
    """

    start: int
    number: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Passes:
    """The passes of a run that are decided.

    Attributes:
        shards: for each cache the shards' names, in the order in which they were taken in.
        spans: in order; none before the first pass is decided.
        decided: how many passes are.
        finished: nothing more is taken in: all later passes are as the last one.
    """

    shards: tuple[tuple[str, ...], ...] = ()
    spans: tuple[Span, ...] = ()
    decided: int = 0
    finished: bool = False

    def has(self, number: int) -> bool:
        """Whether it is decided what pass ``number`` reads."""
        return number < self.decided or self.finished

    def span_at(self, position: int) -> Span:
        """The span in which ``position`` is, or that ends there."""
        return [span for span in self.spans if span.start <= position][-1]

    def span_of(self, number: int) -> Span:
        """The span of pass ``number``."""
        return [span for span in self.spans if span.number <= number][-1]

    def names(self, span: Span) -> list[tuple[str, ...]]:
        """The shards of each cache that the passes of ``span`` read."""
        pairs = zip(self.shards, span.counts, strict=True)
        return [names[:count] for names, count in pairs]

    def grown(
        self, start: int, committed: Sequence[Sequence[str]], finished: bool = False
    ) -> "Passes":
        """With one more pass, which begins at position ``start``.

        A cache that has lost a shard of its list was built anew as another one; nothing more is
        taken in from it.

        Args:
            committed: for each cache the names of all shards that it has by now.
            finished: there will be no more.
        """
        known = self.shards or ((),) * len(committed)
        shards = tuple(_appended(*pair) for pair in zip(known, committed, strict=True))
        counts = tuple(map(len, shards))
        spans = self.spans
        if not spans or spans[-1].counts != counts:
            spans = (*spans, Span(start, self.decided, counts))
        return Passes(shards, spans, self.decided + 1, finished)

    def continues(self, other: "Passes") -> bool:
        """Whether every pass that is decided in ``other`` is so here, and alike."""
        if other.finished or self.decided < other.decided:
            return self == other
        if not other.spans:
            return True
        alike = all(
            own[: len(names)] == names
            for own, names in zip(self.shards, other.shards, strict=False)
        )
        later = self.spans[len(other.spans) :]
        return (
            alike
            and len(self.shards) == len(other.shards)
            and self.spans[: len(other.spans)] == other.spans
            and all(span.number >= other.decided for span in later)
        )

    def is_sound(self) -> bool:
        """Whether its parts fit each other, as they do unless a file was altered."""
        starts = all(one.start < other.start for one, other in pairwise(self.spans))
        numbers = all(one.number < other.number for one, other in pairwise(self.spans))
        inside = all(
            len(span.counts) == len(self.shards)
            and all(0 <= n <= len(names) for n, names in zip(span.counts, self.shards, strict=True))
            for span in self.spans
        )
        begun = not self.spans or (self.spans[0].start == self.spans[0].number == 0)
        last = self.spans[-1].number if self.spans else -1
        return starts and numbers and inside and begun and last < self.decided


NO_PASSES = Passes()


def _appended(known: tuple[str, ...], committed: Sequence[str]) -> tuple[str, ...]:
    there, taken = set(committed), set(known)
    if not taken <= there:
        return known
    return (*known, *(name for name in committed if name not in taken))
