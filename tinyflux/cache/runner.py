"""Who does a build's work: Ray, or this process alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

from tinyflux.cache.encode import ShardEncoder, ShardTask
from tinyflux.cache.estimate import Cost, measure
from tinyflux.cache.fingerprints import ModelFingerprints, take_fingerprints
from tinyflux.cache.index import write_index
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.partition import read_rows
from tinyflux.cache.sources import SourceSplit

MEASURED_BATCHES = 4


class Runner(Protocol):
    """Does a build's work."""

    def prepare(self) -> Callable[[], ModelFingerprints]:
        """Start :func:`take_fingerprints`; the answer waits for it."""
        ...

    def index(self, units: Sequence[SourceSplit]) -> Iterable[None]:
        """Index every unit; an item for each that is done."""
        ...

    def encode(self, tasks: Sequence[ShardTask]) -> Iterable[str]:
        """Encode every task; its name when it is done."""
        ...

    def measure(self, task: ShardTask) -> Cost:
        """:func:`measure_task`, where an actor would run."""
        ...

    def show(self, unit: str, done: int, total: int, rate: float) -> None:
        """Tell watchers how far the work is; ``unit`` is "units" or "rows", ``rate`` a second's."""
        ...


class LocalRunner:
    """One thing after another, in this process, with the threads and the device of one actor."""

    def __init__(self, configs: BuildConfigs):
        self._configs = configs

    @cached_property
    def _encoder(self) -> ShardEncoder:
        return self._configs.encoder()

    def prepare(self) -> Callable[[], ModelFingerprints]:
        return lambda: take_fingerprints(self._configs, self._encoder.extractor)

    def index(self, units: Sequence[SourceSplit]) -> Iterator[None]:
        for unit in units:
            write_index(self._configs.store, self._configs.data, unit)
            yield

    def encode(self, tasks: Sequence[ShardTask]) -> Iterator[str]:
        for task in tasks:
            self._encoder(task)
            yield task.name

    def measure(self, task: ShardTask) -> Cost:
        return measure_task(self._configs, task)

    def show(self, unit: str, done: int, total: int, rate: float) -> None:
        """The terminal's line is all there is."""


def measure_task(configs: BuildConfigs, task: ShardTask) -> Cost:
    """What encoding the first few batches of a shard costs."""
    extractor = configs.encoder().extractor
    rows = read_rows(configs.store, task.rows_file)[: MEASURED_BATCHES * configs.cache.batch_size]
    groups, most = list(task.fingerprints), configs.cache.rows_per_shard
    return measure(extractor, configs.data, rows, task.size, groups, most)
