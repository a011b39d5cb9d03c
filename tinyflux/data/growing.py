"""Reads a run's samples from caches that are still being built.

Each pass has an order of its own over the shards that were committed when it began
(``tinyflux.data.passes``); in a pass all is as in :mod:`tinyflux.data.reader`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from tinyflux.cache.committed import load_committed, shard_id, with_shards
from tinyflux.cache.config import MixSource
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.store import open_store
from tinyflux.data.batches import Place, StepData
from tinyflux.data.ledger import Ledger
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.passes import NO_PASSES, Passes, Span
from tinyflux.data.reader import StepReader
from tinyflux.errors import CacheError

logger = logging.getLogger(__name__)


class GrowingReader:
    """Reads what optimizer steps train on, as :class:`StepReader`, and takes in what is new.

    The main worker decides which shards a pass reads, at its begin, and writes it down; the others
    wait for that.

    Args:
        sources: the caches, of which some may be unfinished.
        val_fraction: share of the pictures that are held out.
        batch_size, accumulation, seed: see :class:`StepReader`.
        start_at_rows: the fewest rows that a run begins with, unless the caches are finished.
        ledger: keeps what is decided; without one the run's checkpoints alone do.
        passes: what a checkpoint knows of them.
        is_main: whether this is the worker that decides; only with a ledger there are others.
        check_files: see :class:`CachedDataset`.

    Attributes:
        first: the shards that the run began with, which held-out samples are taken from.
        data: the shards of the pass that is being read.

    Raises:
        CacheError: too few rows, or shards that the run reads are gone.
    """

    def __init__(
        self,
        sources: Sequence[MixSource],
        val_fraction: float,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        start_at_rows: int = 1,
        ledger: Ledger | None = None,
        passes: Passes = NO_PASSES,
        is_main: bool = True,
        check_files: bool = True,
    ):
        self._sources, self._val_fraction = list(sources), val_fraction
        self._batch_size, self._accumulation, self._seed = batch_size, accumulation, seed
        self._start_at_rows, self._ledger, self._is_main = start_at_rows, ledger, is_main
        self._passes = self._agreed(passes)
        self._decide(0, 0)
        self.first = open_first(self._sources, self._passes, check_files)
        self.data = self.first
        self._opened: tuple[Span, np.ndarray] = (
            self._passes.spans[0],
            self.first.held_out(val_fraction),
        )

    @property
    def passes(self) -> Passes:
        """What is decided so far."""
        return self._passes

    @property
    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """See :attr:`CacheMixture.null_text`."""
        return self.first.null_text

    @property
    def t_buckets(self) -> Tensor:
        """``[K]`` times of the teachers' features; empty without teachers."""
        return self.first.t_buckets

    def sol_examples(self, count: int) -> tuple[Tensor, Tensor] | None:
        """See :meth:`StepReader.sol_examples`; those of the first pass."""
        held_out = self.first.held_out(self._val_fraction)
        return self._reader(self.first, held_out, 0, 0).sol_examples(count)

    def after(self, place: Place) -> Iterator[StepData]:
        """What a run in one process trains on: the same as all workers of a larger one.

        Raises:
            CacheError: the run did not begin on growing caches, or with other passes than these.
        """
        if place.samples_seen and not place.passes.spans:
            raise CacheError(
                "the run began on finished caches, whose order of samples is another: go on with a "
                "StepReader"
            )
        if not self._passes.continues(place.passes):
            raise CacheError(
                "the reader has decided otherwise than the checkpoint what its passes read: make "
                "it with the ledger of the run, or with the passes of the checkpoint's state"
            )
        return self.steps(place.samples_seen)

    def steps(self, samples_seen: int = 0, rank: int = 0, world: int = 1) -> Iterator[StepData]:
        """What worker ``rank`` of ``world`` trains on, without end, from ``samples_seen`` on."""
        number, start = self._locate(samples_seen)
        while True:
            self._decide(number, start)
            reader = self._open(number, start)
            end = start + reader.pass_length
            while samples_seen < end:
                step = reader.step(samples_seen, rank, world)
                samples_seen = step.samples_seen
                yield replace(step, epoch=number + (samples_seen == end), passes=self._passes)
            number, start = number + 1, end

    def _agreed(self, passes: Passes) -> Passes:
        """A checkpoint's ``passes``, and the ledger's as far as it goes on from them."""
        if self._ledger is not None:
            written = self._ledger.load()
            if written.continues(passes):
                passes = written
            elif self._is_main:
                logger.warning(
                    "the run's file of passes is not its checkpoint's: it goes by the checkpoint"
                )
                self._ledger.save(passes)
        if passes.spans and len(passes.shards) != len(self._sources):
            raise CacheError(
                f"the run began on {len(passes.shards)} caches, not {len(self._sources)}: keep "
                "them, or use a new run_dir"
            )
        return passes

    def _decide(self, number: int, start: int) -> None:
        """Have it decided what pass ``number``, which begins at position ``start``, reads."""
        if self._passes.has(number):
            return
        if not self._is_main and self._ledger is not None:
            self._passes = self._ledger.wait(number)
            return
        before = self._passes
        self._passes = before.grown(start, *self._committed())
        if self._ledger is not None:
            self._ledger.save(self._passes)
        if before.spans and self._passes.spans != before.spans:
            counts = self._passes.spans[-1].counts
            logger.info(
                "pass %d takes in new shards: %d in place of %d",
                number, sum(counts), sum(before.spans[-1].counts),
            )  # fmt: skip

    def _committed(self) -> tuple[list[list[str]], bool]:
        """The names of each cache's shards, and whether all caches are finished."""
        try:
            manifests, finished = open_committed(self._sources)
        except CacheError as error:
            if not self._passes.spans:
                raise
            logger.warning("the run goes on with the shards that it has: %s", error)
            return [list(names) for names in self._passes.shards], False
        if not self._passes.spans and not finished:
            check_rows(manifests, self._start_at_rows)
        return [[shard_id(shard) for shard in one.shards] for one in manifests], finished

    def _locate(self, position: int) -> tuple[int, int]:
        """The pass in which ``position`` is, and where it begins."""
        span = self._passes.span_at(position)
        length = self._open(span.number, span.start).pass_length
        done = (position - span.start) // length
        return span.number + done, span.start + done * length

    def _open(self, number: int, start: int) -> StepReader:
        """What reads pass ``number``, which begins at position ``start``."""
        span, held_out = self._opened
        if (wanted := self._passes.span_of(number)) != span:
            manifests, _ = open_committed(self._sources)
            self.data = _mixture(self._sources, manifests, self._passes.names(wanted), False)
            held_out = self.data.held_out(self._val_fraction)
            self._opened = wanted, held_out
        return self._reader(self.data, held_out, number, start)

    def _reader(
        self, data: CacheMixture, held_out: np.ndarray, number: int, start: int
    ) -> StepReader:
        part = ("pass", number)
        return StepReader(
            data, held_out, self._batch_size, self._accumulation, self._seed, start, part
        )


def open_committed(sources: Sequence[MixSource]) -> tuple[list[Manifest], bool]:
    """What is committed of each cache, and whether all are finished; CacheError if nothing is."""
    found = [load_committed(open_store(source.path)) for source in sources]
    return [manifest for manifest, _ in found], all(finished for _, finished in found)


def open_first(
    sources: Sequence[MixSource], passes: Passes, check_files: bool = True, start_at_rows: int = 1
) -> CacheMixture:
    """The shards that a run begins with: of its first pass, or if that is not decided, all.

    Raises:
        CacheError: they are gone, or unfinished caches have fewer than ``start_at_rows`` so far.
    """
    manifests, finished = open_committed(sources)
    if passes.spans:
        return _mixture(sources, manifests, passes.names(passes.spans[0]), check_files)
    if not finished:
        check_rows(manifests, start_at_rows)
    return CacheMixture(sources, check_files, manifests)


def check_rows(manifests: Sequence[Manifest], start_at_rows: int) -> None:
    """Refuse to begin with fewer rows than are wanted; CacheError."""
    rows = sum(manifest.rows for manifest in manifests)
    if rows < start_at_rows:
        raise CacheError(
            f"the unfinished caches hold {rows} rows so far, and trainer.start_at_rows is "
            f"{start_at_rows}: start again when there are more, or lower it"
        )


def _mixture(
    sources: Sequence[MixSource],
    manifests: Sequence[Manifest],
    names: Sequence[Sequence[str]],
    check_files: bool,
) -> CacheMixture:
    chosen = [
        with_shards(manifest, shards, source.path)
        for source, manifest, shards in zip(sources, manifests, names, strict=True)
    ]
    return CacheMixture(sources, check_files, chosen)
