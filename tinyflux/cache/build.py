"""Building a dataset: what there is to do, who does it, and the manifest at the end.

Pictures are indexed, cut into shards, and encoded; each column group of a shard is one file,
committed by its receipt. The manifest is written when all are there. A run that was killed anywhere
continues with what has no receipt, and a run with other pictures or models computes only what these
change.

The work itself is a :class:`Runner`'s: Ray's, or this process's own.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.encode import ShardEncoder, ShardTask
from tinyflux.cache.estimate import ESTIMATE_NAME, Cost, Estimate, compare, measure
from tinyflux.cache.extract import Extractor, extractor_for
from tinyflux.cache.index import INDEX_FOLDER, index_path, read_index, write_index
from tinyflux.cache.keys import digest_of
from tinyflux.cache.manifest import (
    BUILD_MARK,
    MANIFEST_NAME,
    MODEL_SETTINGS,
    CutCaptions,
    FileInfo,
    Manifest,
    Recipe,
    ShardInfo,
    sha256,
)
from tinyflux.cache.partition import PlannedShard, Rejected, plan_shards
from tinyflux.cache.receipts import RECEIPT_FOLDER, Receipt, read_receipt, receipt_path
from tinyflux.cache.reuse import ReusableRows, Reused
from tinyflux.cache.schema import ROWS
from tinyflux.cache.shards import is_whole, write_null_text
from tinyflux.cache.sources import SourceSplit, list_splits
from tinyflux.cache.store import Store, open_store
from tinyflux.errors import CacheError, ConfigError, InputError
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.util.config import from_dict, to_dict

MAKERS_NAME, REJECTED_NAME = "makers.json", "rejected.parquet"
MEASURED_BATCHES = 4

Receipts = dict[tuple[str, str], Receipt]  # by shard and group


@dataclasses.dataclass(frozen=True)
class BuildConfigs:
    """What every process of a build is told."""

    data: DataConfig
    zoo: ZooConfig
    cache: CacheConfig
    model: TinyFluxConfig

    @cached_property
    def store(self) -> Store:
        return open_store(self.cache.path)

    def encoder(self) -> ShardEncoder:
        """For one process, which keeps it and the models that it holds."""
        torch.set_num_threads(max(1, int(self.cache.cpus_per_actor)))
        zoo = self.zoo
        if zoo.device == "auto" and self.cache.gpus_per_actor == 0:
            zoo = dataclasses.replace(zoo, device="cpu")  # in a process that Ray did not start, too
        extractor = extractor_for(zoo.build(self.model), self.cache)
        return ShardEncoder(self.store, self.data, extractor, self.model.text_padding == "zero")


@dataclasses.dataclass(frozen=True)
class ModelFingerprints:
    """What the models are: their recipe, and the file of the empty caption's embedding."""

    recipe: Recipe
    null_text: FileInfo


class Runner(Protocol):
    """Does a build's work; the functions are below."""

    def prepare(self) -> Callable[[], ModelFingerprints]:
        """Start :func:`prepare`; the answer waits for it."""
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
        return lambda: prepare(self._configs, self._encoder.extractor)

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


def prepare(configs: BuildConfigs, extractor: Extractor) -> ModelFingerprints:
    """Load the models, name them by their weights, and encode the empty caption."""
    recipe = extractor.recipe(mask=bool(configs.data.mask_key))
    path = f"null_text.{recipe.groups['text'].maker[:8]}.safetensors"
    return ModelFingerprints(recipe, write_null_text(configs.store, *extractor.null_text(), path))


def measure_task(configs: BuildConfigs, task: ShardTask) -> Cost:
    """What encoding the first few batches of a shard costs."""
    extractor = configs.encoder().extractor
    table = pq.read_table(pa.BufferReader(configs.store.read(task.rows_file)))
    rows = table.slice(0, MEASURED_BATCHES * configs.cache.batch_size).to_pydict()
    groups, most = list(task.makers), configs.cache.rows_per_shard
    return measure(extractor, configs.data, rows, task.size, groups, most)


def estimate(configs: BuildConfigs, runner: Runner) -> Estimate:
    """Predict what a build from scratch would take, from a few batches.

    The pictures are indexed for it, which the build will not do again; the prediction is kept
    beside the dataset, and compared with what comes true.
    """
    with _prepared(configs, runner) as (_, makers, planned, rejected):
        largest = max(planned, key=lambda shard: shard.rows)
        groups = {group: info.maker for group, info in makers.recipe.groups.items()}
        cost = runner.measure(ShardTask(largest.name, largest.size, largest.file.path, groups, {}))
        sizes: dict[str, int] = {}
        for shard in planned:
            name = f"{shard.size[0]} x {shard.size[1]}"
            sizes[name] = sizes.get(name, 0) + shard.rows
        actors = min(configs.cache.num_actors, len(planned))
        found = Estimate(sum(sizes.values()), len(planned), actors, sizes, largest.size, cost)
        configs.store.write(ESTIMATE_NAME, json.dumps(to_dict(found), indent=1).encode())
    if rejected.rows:
        print(f"cache: {len(rejected.rows)} of {rejected.seen} pictures cannot be used", flush=True)
    return found


def build(configs: BuildConfigs, runner: Runner) -> Manifest:
    """Build the dataset at ``cache.path``, or what is missing of it or has changed.

    Raises:
        InputError: more pictures than ``data.max_rejected`` cannot be used.
        CacheError: ``cache.path`` is not a build job's, or cannot be written.
    """
    with _prepared(configs, runner) as (units, makers, planned, rejected):
        _check_rejected(configs.data, len(rejected.rows), rejected)
        receipts = _encode(configs, runner, makers.recipe, planned, rejected)
        manifest = _commit(configs, makers, units, planned, receipts, rejected)
    if manifest.cut_captions:
        how = "data.long_captions: reject leaves them out"
        print(f"cache: {manifest.cut_captions} ({how})", flush=True)
    shards = len(manifest.shards)
    print(f"cache: {manifest.rows} rows in {shards} shards at {configs.cache.path}", flush=True)
    return manifest


@contextmanager
def _prepared(
    configs: BuildConfigs, runner: Runner
) -> Iterator[tuple[list[SourceSplit], ModelFingerprints, list[PlannedShard], Rejected]]:
    """Index the pictures, look at the models and cut shards, with the directory locked."""
    data, store = configs.data, configs.store
    if not configs.cache.path:
        raise ConfigError("cache.path is not set: name the directory of the dataset")
    units = list_splits(data)
    try:
        with claim(store):
            makers = _index_and_prepare(configs, runner, units)
            rejected = Rejected()
            tables = (read_index(store, data, unit) for unit in units)
            size = configs.cache.rows_per_shard
            planned = list(plan_shards(store, data, tables, size, rejected))
            if not planned:
                _check_rejected(data, len(rejected.rows), rejected)
            yield units, makers, planned, rejected
    except OSError as error:
        raise CacheError(
            f"the cache at '{store.location}' cannot be written ({error}): mend that, and run the "
            f"same command again to continue"
        ) from error


@contextmanager
def claim(store: Store) -> Iterator[None]:
    """Make ``store`` this job's while it works, or say why it cannot be."""
    if store.size(MANIFEST_NAME) is not None and not Manifest.load(store).built:
        raise CacheError(
            f"'{store.location}' holds a dataset that no build job made: use another cache.path"
        )
    if store.size(BUILD_MARK) is None:
        if any(not name.startswith(f".{BUILD_MARK}.") for name in store.names()):
            raise CacheError(
                f"cache.path '{store.location}' holds other files and no cache: name a new or "
                f"empty directory"
            )
        # First, so that whatever else is found here later is known to be this cache's.
        store.write(BUILD_MARK, b'{"owner": "tinyflux"}\n')
    with store.held(BUILD_MARK):
        yield


def _index_and_prepare(
    configs: BuildConfigs, runner: Runner, units: list[SourceSplit]
) -> ModelFingerprints:
    """Index the units that are not, and find out what the models are; both at once."""
    data, there = configs.data, configs.store.list(INDEX_FOLDER)
    missing = [unit for unit in units if index_path(data, unit) not in there]
    known = _known_makers(configs)
    pending = runner.prepare() if known is None else None
    if missing:
        progress = _Progress(runner, "indexed", "units", len(units), len(units) - len(missing))
        for _ in runner.index(missing):
            progress.add(1)
    if pending is not None:
        known = pending()
        if (signature := _signature(configs)) is not None:
            record = {"signature": signature, **to_dict(known)}
            configs.store.write(MAKERS_NAME, json.dumps(record, indent=1).encode())
    assert known is not None
    return known


def _signature(configs: BuildConfigs) -> str | None:
    """Changes when the weights may have; None for models of the hub, which can change any time."""
    zoo = configs.zoo
    files = []
    for repo in {zoo.vae_repo, zoo.t5_repo, zoo.clip_repo, zoo.experts_repo, zoo.sd_repo}:
        if not os.path.isdir(repo):
            return None
        for path in sorted(Path(repo).rglob("*")):
            if path.is_file():
                state = path.stat()
                files.append([str(path), state.st_size, state.st_mtime_ns])
    settings = {**to_dict(configs.cache), **to_dict(configs.model)}
    chosen = [*("extract_lune", "extract_sol", "seed"), *MODEL_SETTINGS]
    made_with = {name: settings[name] for name in chosen}
    return digest_of([sorted(files), made_with, to_dict(zoo), bool(configs.data.mask_key)])


def _known_makers(configs: BuildConfigs) -> ModelFingerprints | None:
    """What an earlier run found out about these models, unless their files have changed."""
    try:
        record = json.loads(configs.store.read(MAKERS_NAME))
        signature = _signature(configs)
        if signature is None or record.pop("signature") != signature:
            return None
        makers = from_dict(ModelFingerprints, record, MAKERS_NAME)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return makers if is_whole(configs.store, makers.null_text) else None


def _encode(
    configs: BuildConfigs,
    runner: Runner,
    recipe: Recipe,
    planned: list[PlannedShard],
    rejected: Rejected,
) -> Receipts:
    """Receipts of every planned file; what has none is made."""
    store = configs.store
    makers = {group: info.maker for group, info in recipe.groups.items()}
    receipts = read_receipts(store, planned, makers)
    lacking: dict[str, list[str]] = {}
    for shard in planned:
        if missing := [group for group in makers if (shard.name, group) not in receipts]:
            lacking[shard.name] = missing
    todo = {shard.name: shard for shard in planned if shard.name in lacking}
    if not todo:
        return receipts
    total, left = (sum(shard.rows for shard in some) for some in (planned, todo.values()))
    if receipts:
        print(f"cache: {total - left} of {total} rows are there as they should be", flush=True)
    tasks = describe_tasks(store, planned, lacking, makers)
    progress = _Progress(runner, "encoded", "rows", total, total - left)
    failed = len(rejected.rows)
    for name in runner.encode(tasks):
        made = []
        for group in lacking[name]:
            receipt = read_receipt(store, name, group, makers[group])
            if receipt is None:
                raise CacheError(
                    f"shard {name} was written but is not whole at '{store.location}': is that "
                    f"directory shared by all nodes?"
                )
            receipts[name, group] = receipt
            made.append(receipt)
        dropped = unusable(configs.data, made)
        failed += len(dropped)
        _check_rejected(configs.data, failed, rejected, *dropped.values())
        progress.add(todo[name].rows)
    if len(receipts) != len(planned) * len(makers):
        raise CacheError("not every shard was built: run the job again to continue")
    _print_work(receipts, lacking)
    if (expected := read_estimate(store)) is not None and len(todo) == len(planned):
        sizes: dict[str, int] = {}
        for (_, group), receipt in receipts.items():
            sizes[group] = sizes.get(group, 0) + (receipt.file.bytes if receipt.file else 0)
        print(compare(expected, sizes, receipts.values()), flush=True)
    return receipts


def read_estimate(store: Store) -> Estimate | None:
    """What :func:`estimate` found out here, if it was asked."""
    try:
        return from_dict(Estimate, json.loads(store.read(ESTIMATE_NAME)), "estimate")
    except (OSError, ValueError, TypeError, ConfigError):
        return None


def read_receipts(
    store: Store, planned: Iterable[PlannedShard], makers: Mapping[str, str]
) -> Receipts:
    """Those of the planned files that are there."""
    there = store.list(RECEIPT_FOLDER)
    wanted = (
        (shard.name, group, maker)
        for shard in planned
        for group, maker in makers.items()
        if receipt_path(shard.name, group, maker) in there
    )
    receipts = store.each(lambda one: read_receipt(store, *one), wanted)
    return {(found.shard, found.group): found for found in receipts if found is not None}


def describe_tasks(
    store: Store,
    planned: Sequence[PlannedShard],
    lacking: Mapping[str, list[str]],
    makers: Mapping[str, str],
) -> list[ShardTask]:
    """What is to be made of the shards that lack groups, and what of it is known already."""
    there = store.list(RECEIPT_FOLDER)
    outdated = {
        shard.name
        for shard in planned
        for group in lacking.get(shard.name, ())
        if receipt_path(shard.name, group, makers[group]) in there
    }
    former = ReusableRows(store, makers, {shard.name for shard in planned} - outdated)
    found = []
    for shard in planned:
        reused: dict[str, Reused] = {}
        for group in lacking.get(shard.name, ()):
            reused[group] = former.find(group, shard.file.path, shard.size)
        if reused:
            wanted = {group: makers[group] for group in reused}
            found.append(ShardTask(shard.name, shard.size, shard.file.path, wanted, reused))
    return found


def _commit(
    configs: BuildConfigs,
    makers: ModelFingerprints,
    units: Sequence[SourceSplit],
    planned: Iterable[PlannedShard],
    receipts: Receipts,
    rejected: Rejected,
) -> Manifest:
    """Write the manifest, unless it says the same already."""
    store, shards, cut_clip, cut_t5 = configs.store, [], 0, 0
    for shard in planned:
        own = {group: receipts[shard.name, group] for group in makers.recipe.groups}
        reasons = unusable(configs.data, own.values())
        kept = [cut for cut in own["text"].cut_rows if cut[0] not in reasons]
        cut_clip += sum(clip > 0 for _, clip, _ in kept)
        cut_t5 += sum(t5 > 0 for _, _, t5 in kept)
        if reasons:
            table = pq.read_table(pa.BufferReader(store.read(shard.file.path)), columns=["source"])
            sources = table["source"].to_pylist()
            rejected.rows += [(sources[row], reasons[row]) for row in sorted(reasons)]
        if len(reasons) < shard.rows:
            files = {group: r.file for group, r in own.items() if r.file is not None}
            dropped = tuple(sorted(reasons))
            shards.append(ShardInfo(shard.name, shard.rows, {ROWS: shard.file, **files}, dropped))
    _check_rejected(configs.data, len(rejected.rows), rejected)
    if rejected.duplicates:
        print(f"cache: {rejected.duplicates} samples are listed twice and kept once", flush=True)
    manifest = Manifest(
        rows=sum(shard.samples for shard in shards),
        recipe=makers.recipe,
        shards=tuple(shards),
        null_text=makers.null_text,
        rejected=_write_rejected(store, rejected),
        index=tuple(index_path(configs.data, unit) for unit in units),
        name=store.name,
        built=True,
        cut_captions=CutCaptions(cut_clip, cut_t5) if cut_clip or cut_t5 else None,
    )
    if store.size(MANIFEST_NAME) is None or store.read(MANIFEST_NAME) != manifest.to_json():
        manifest.save(store)
    return manifest


def unusable(data: DataConfig, receipts: Iterable[Receipt]) -> dict[int, str]:
    """Rows of a shard that are left out of the dataset, by number, with the reason."""
    found: dict[int, str] = {}
    for receipt in receipts:
        found.update(dict(receipt.rejected))
        if data.long_captions == "reject":
            found.update({row: _too_long(clip, t5) for row, clip, t5 in receipt.cut_rows})
    return found


def _too_long(clip: int, t5: int) -> str:
    return (
        f"its caption has {clip} tokens more than CLIP reads and {t5} more than T5 does "
        f"(model.max_text_length): shorten it, or set data.long_captions: cut"
    )


def _check_rejected(data: DataConfig, count: int, rejected: Rejected, *reasons: str) -> None:
    """Refuse to go on when too many pictures are left out."""
    if count == rejected.seen or count > data.max_rejected * rejected.seen:
        reason = next(iter(reasons)) if reasons else rejected.rows[0][1]
        raise InputError(
            f"{count} of {rejected.seen} pictures in '{data.folder}' cannot be used, such as: "
            f"{reason} (data.max_rejected = {data.max_rejected:g} is the share that may be left "
            f"out)"
        )


def _write_rejected(store: Store, rejected: Rejected) -> FileInfo | None:
    """The table of what is not in the dataset."""
    if not rejected.rows:
        return None
    sources, reasons = zip(*rejected.rows, strict=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"source": sources, "reason": reasons}), sink)
    data = memoryview(sink.getvalue())
    file = FileInfo(REJECTED_NAME, len(data), sha256(data))
    store.write(REJECTED_NAME, data)
    return file


def _print_work(receipts: Receipts, lacking: dict[str, list[str]]) -> None:
    """How many rows of each group were run through models."""
    rows: dict[str, int] = {}
    for shard, groups in lacking.items():
        for group in groups:
            rows[group] = rows.get(group, 0) + receipts[shard, group].computed
    print(f"cache: computed {', '.join(f'{n} {g}' for g, n in rows.items())}", flush=True)


class _Progress:
    """A line per piece: done, rate, time left."""

    def __init__(self, runner: Runner, verb: str, unit: str, total: int, done: int):
        self._runner, self._verb, self._unit = runner, verb, unit
        self._total, self._done, self._first = total, done, done
        self._started = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        seconds = time.monotonic() - self._started
        rate = (self._done - self._first) / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        print(
            f"cache: {self._verb} {self._done}/{self._total} {self._unit}  "
            f"{rate:.1f} {self._unit}/s  {left:.0f} s left",
            flush=True,
        )
        self._runner.show(self._unit, self._done, self._total, rate)
