"""The job that builds a dataset: Ray around :mod:`tinyflux.cache`.

Pictures are indexed, cut into shards, and encoded by a pool of actors; each column group of a shard
is one file, committed by its receipt. The manifest is written when all are there. A run that was
killed anywhere continues with what has no receipt, and a run with other pictures or models computes
only what these change.
"""

import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.encode import ShardEncoder, ShardTask
from tinyflux.cache.extract import CacheConfig, extractor_for
from tinyflux.cache.index import INDEX_FOLDER, index_path, read_index, write_index
from tinyflux.cache.keys import digest_of
from tinyflux.cache.manifest import (
    BUILD_MARK,
    MANIFEST_NAME,
    FileInfo,
    Manifest,
    Recipe,
    ShardInfo,
    sha256,
)
from tinyflux.cache.plan import PlannedShard, Rejected, plan_shards
from tinyflux.cache.receipts import RECEIPT_FOLDER, Receipt, read_receipt
from tinyflux.cache.reuse import FormerRows, Reused, read_contents
from tinyflux.cache.schema import ROWS
from tinyflux.cache.shards import SHARD_FOLDER, is_whole, write_null_text
from tinyflux.cache.sources import DataConfig, Unit, list_units
from tinyflux.errors import CacheError, ConfigError, InputError, TinyFluxError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.zoo import ZooConfig
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write

MAKERS_NAME, REJECTED_NAME = "makers.json", "rejected.parquet"


@dataclasses.dataclass(frozen=True)
class BuildConfigs:
    """What every process of a build is told."""

    data: DataConfig
    zoo: ZooConfig
    cache: CacheConfig
    model: TinyFluxConfig

    @property
    def directory(self) -> Path:
        return Path(self.cache.path)

    def pack(self) -> dict[str, Any]:
        """As plain data between processes."""
        return to_dict(self)

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> "BuildConfigs":
        return from_dict(cls, data, "the build's configs")


def build_cache(
    data: DataConfig, zoo: ZooConfig, cache: CacheConfig, model: TinyFluxConfig
) -> Manifest:
    """Build the dataset at ``cache.path``, or what is missing of it or has changed.

    Raises:
        InputError: more pictures than ``data.max_rejected`` cannot be used.
        CacheError: ``cache.path`` is not a build job's, or cannot be written.
    """
    if not cache.path:
        raise ConfigError("cache.path is not set: name the directory of the dataset")
    configs = BuildConfigs(data, zoo, cache, model)
    directory = configs.directory
    try:
        lock = claim(directory)
        units = list_units(data)
        recipe, null_text = _index_and_prepare(configs, units)
        rejected = Rejected()
        tables = (read_index(directory, data, unit) for unit in units)
        planned = list(plan_shards(directory, data, tables, cache.rows_per_shard, rejected))
        _check_rejected(data, rejected)
        receipts = _encode(configs, recipe, planned, rejected)
        index = [index_path(directory, data, unit) for unit in units]
        files = tuple(str(path.relative_to(directory)) for path in index)
        made = Manifest(0, recipe, (), null_text, index=files, name=directory.name, built=True)
        manifest = _commit(configs, made, planned, receipts, rejected)
        lock.close()
    except OSError as error:
        raise CacheError(
            f"the cache at '{directory}' cannot be written ({error}): mend that, and run the same "
            f"command again to continue"
        ) from error
    print(f"cache: {manifest.rows} rows in {len(manifest.shards)} shards at {directory}", flush=True)
    return manifest


def claim(directory: Path) -> IO[bytes]:
    """Make ``directory`` this job's, or say why it cannot be.

    Returns:
        The lock, held until it is closed or the process ends.
    """
    if (directory / MANIFEST_NAME).exists() and not Manifest.load(directory).built:
        raise CacheError(
            f"'{directory}' holds a dataset that no build job made: use another cache.path"
        )
    mark = directory / BUILD_MARK
    if not mark.exists():
        if directory.exists() and not all(
            entry.match(f".{BUILD_MARK}.*.tmp") for entry in directory.iterdir()
        ):
            raise CacheError(
                f"cache.path '{directory}' holds other files and no cache: name a new or empty "
                f"directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        # First, so that whatever else is found here later is known to be this cache's.
        atomic_write(mark, b'{"owner": "tinyflux"}\n')
    lock = mark.open("rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CacheError(f"another job is working on the cache at '{directory}': wait for it") from None
    for folder in (INDEX_FOLDER, RECEIPT_FOLDER, SHARD_FOLDER):
        (directory / folder).mkdir(exist_ok=True)
    for leftover in directory.rglob(".*.tmp"):  # of writers that were killed
        leftover.unlink(missing_ok=True)
    return lock


# Pictures and models


def _index_and_prepare(configs: BuildConfigs, units: list[Unit]) -> tuple[Recipe, FileInfo]:
    """Index the units that are not, and find out what the models are; both at once."""
    directory, data = configs.directory, configs.data
    missing = [unit for unit in units if not index_path(directory, data, unit).exists()]
    known = _known_makers(configs)
    pending = None
    if known is None:
        ray = _start_ray(configs.cache)
        pending = (
            ray.remote(_prepare)
            .options(num_cpus=configs.cache.cpus_per_actor, num_gpus=configs.cache.gpus_per_actor)
            .remote(configs.pack())
        )
    if missing:
        ray = _start_ray(configs.cache)
        rows = [{"unit": json.dumps(to_dict(unit))} for unit in missing]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _index_unit, batch_size=1, fn_args=[configs.pack()], num_cpus=1
        )
        progress = _Progress("indexed", "units", len(units), len(units) - len(missing))
        for answer in done.iter_rows():
            _raise_known(answer)
            progress.add(1)
    if known is None:
        answer = ray.get(pending)
        _raise_known(answer)
        known = _unpack_makers(answer["made"])
        if (signature := _signature(configs)) is not None:
            record = {"signature": signature, **answer["made"]}
            atomic_write(directory / MAKERS_NAME, json.dumps(record, indent=1).encode())
    return known


def _index_unit(batch: dict[str, Any], packed: dict[str, Any]) -> dict[str, list[str]]:
    configs = BuildConfigs.unpack(packed)
    unit = from_dict(Unit, json.loads(str(batch["unit"][0])), "a unit")
    return _answer(lambda: write_index(configs.directory, configs.data, unit))


def _prepare(packed: dict[str, Any]) -> dict[str, Any]:
    """Load the models, name them by their weights, and encode the empty caption."""
    configs = BuildConfigs.unpack(packed)
    made: dict[str, Any] = {}

    def prepare() -> None:
        extractor = _extractor(configs)
        recipe = extractor.recipe(mask=bool(configs.data.mask_key))
        maker = recipe.groups["text"].maker
        file = write_null_text(
            configs.directory, *extractor.null_text(), f"null_text.{maker[:8]}.safetensors"
        )
        made.update(recipe=to_dict(recipe), null_text=to_dict(file))

    return {**{key: value[0] for key, value in _answer(prepare).items()}, "made": made}


def _extractor(configs: BuildConfigs) -> Any:
    import torch

    torch.set_num_threads(max(1, int(configs.cache.cpus_per_actor)))
    return extractor_for(configs.zoo.build(configs.model), configs.cache)


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
    chosen = ("extract_lune", "extract_sol", "seed", "t5_layers", "max_text_length")
    chosen += ("text_padding", "latent_shift")
    made_with = {name: settings[name] for name in chosen}
    return digest_of([sorted(files), made_with, to_dict(zoo), bool(configs.data.mask_key)])


def _known_makers(configs: BuildConfigs) -> tuple[Recipe, FileInfo] | None:
    """What an earlier run found out about these models, unless their files have changed."""
    try:
        record = json.loads((configs.directory / MAKERS_NAME).read_bytes())
        signature = _signature(configs)
        if signature is None or record["signature"] != signature:
            return None
        recipe, null_text = _unpack_makers(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (recipe, null_text) if is_whole(configs.directory, null_text) else None


def _unpack_makers(record: dict[str, Any]) -> tuple[Recipe, FileInfo]:
    return Recipe.from_dict(record["recipe"]), FileInfo.from_dict(record["null_text"])


# Shards


def _encode(
    configs: BuildConfigs, recipe: Recipe, planned: list[PlannedShard], rejected: Rejected
) -> dict[tuple[str, str], Receipt]:
    """Receipts of every planned file, by shard and group; what has none is made."""
    directory = configs.directory
    makers = {group: info.maker for group, info in recipe.groups.items()}
    receipts: dict[tuple[str, str], Receipt] = {}
    lacking: dict[str, list[str]] = {}
    for shard in planned:
        for group, maker in makers.items():
            receipt = read_receipt(directory, shard.name, group, maker)
            if receipt is None:
                lacking.setdefault(shard.name, []).append(group)
            else:
                receipts[shard.name, group] = receipt
    total = sum(shard.rows for shard in planned)
    todo = [shard for shard in planned if shard.name in lacking]
    left = sum(shard.rows for shard in todo)
    if not todo:
        return receipts
    if receipts:
        print(f"cache: {total - left} of {total} rows are there as they should be", flush=True)
    former = FormerRows(directory, makers, {shard.name for shard in planned})
    tasks = (_task(directory, shard, lacking[shard.name], makers, former) for shard in todo)
    progress = _Progress("encoded", "rows", total, total - left)
    by_name = {shard.name: shard for shard in todo}
    failed = len(rejected.rows)
    for answer in _run_actors(configs, [json.dumps(to_dict(task)) for task in tasks]):
        _raise_known(answer)
        shard = by_name[answer["name"]]
        dropped: set[int] = set()
        for group in lacking[shard.name]:
            receipt = read_receipt(directory, shard.name, group, makers[group])
            if receipt is None:
                raise CacheError(
                    f"shard {shard.name} was written but is not whole at '{directory}': is that "
                    f"directory shared by all nodes?"
                )
            receipts[shard.name, group] = receipt
            dropped.update(receipt.rejected)
        failed += len(dropped)
        if failed > configs.data.max_rejected * rejected.seen:
            _raise_rejected(configs.data, failed, rejected.seen, receipts)
        progress.add(shard.rows)
    if len(receipts) != len(planned) * len(makers):
        raise CacheError("Ray ended before every shard was built: run the job again to continue")
    _print_work(receipts, lacking)
    return receipts


def _task(
    directory: Path,
    shard: PlannedShard,
    groups: list[str],
    makers: dict[str, str],
    former: FormerRows,
) -> ShardTask:
    reused: dict[str, Reused] = {}
    for group in groups:
        contents = read_contents(directory / shard.file.path, group, shard.size)
        reused[group] = former.find(group, contents)
    wanted = {group: makers[group] for group in groups}
    return ShardTask(shard.name, shard.size, shard.file.path, wanted, reused)


class _ShardActor:
    """Holds the models and encodes tasks."""

    def __init__(self, packed: dict[str, Any]):
        self._configs = BuildConfigs.unpack(packed)
        self._encoder: ShardEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        task = from_dict(ShardTask, json.loads(str(batch["task"][0])), "a task")
        return {"name": [task.name], **_answer(lambda: self._encode(task))}

    def _encode(self, task: ShardTask) -> None:
        if self._encoder is None:
            configs = self._configs
            trim = configs.model.text_padding == "zero"
            extractor = _extractor(configs)
            self._encoder = ShardEncoder(configs.directory, configs.data, extractor, trim)
        self._encoder(task)


def _run_actors(configs: BuildConfigs, tasks: list[str]) -> Iterator[dict[str, Any]]:
    """One answer per task, as they are done."""
    cache = configs.cache
    ray = _start_ray(cache)
    answers = ray.data.from_items(
        [{"task": task} for task in tasks], override_num_blocks=len(tasks)
    ).map_batches(
        _ShardActor,
        fn_constructor_args=[configs.pack()],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(cache.num_actors, len(tasks))),
        num_cpus=cache.cpus_per_actor,
        num_gpus=cache.gpus_per_actor or None,
    )
    yield from answers.iter_rows()


def _commit(
    configs: BuildConfigs,
    manifest: Manifest,
    planned: list[PlannedShard],
    receipts: dict[tuple[str, str], Receipt],
    rejected: Rejected,
) -> Manifest:
    """Complete the manifest and write it, unless it says the same already."""
    shards = []
    for shard in planned:
        own = {group: receipts[shard.name, group] for group in manifest.recipe.groups}
        reasons: dict[int, str] = {}
        for receipt in own.values():
            reasons = {**receipt.rejected, **reasons}
        if reasons:
            table = pq.read_table(configs.directory / shard.file.path, columns=["source"])
            sources = table["source"].to_pylist()
            rejected.rows += [(sources[row], reasons[row]) for row in sorted(reasons)]
        if len(reasons) < shard.rows:
            files = {group: r.file for group, r in own.items() if r.file is not None}
            dropped = tuple(sorted(reasons))
            shards.append(ShardInfo(shard.name, shard.rows, {ROWS: shard.file, **files}, dropped))
    _check_rejected(configs.data, rejected)
    manifest = dataclasses.replace(
        manifest,
        rows=sum(shard.samples for shard in shards),
        shards=tuple(shards),
        rejected=_write_rejected(configs.directory, rejected),
    )
    path = configs.directory / MANIFEST_NAME
    if not path.exists() or path.read_bytes() != manifest.to_json():
        manifest.save(configs.directory)
    return manifest


# Refusals and progress


def _check_rejected(data: DataConfig, rejected: Rejected) -> None:
    """Refuse to go on, or say how many pictures are left out."""
    count, seen = len(rejected.rows), rejected.seen
    if count == seen or count > data.max_rejected * seen:
        raise InputError(_refusal(data, count, seen, rejected.rows[0][1]))
    if rejected.duplicates:
        print(f"cache: {rejected.duplicates} samples are listed twice and kept once", flush=True)


def _raise_rejected(
    data: DataConfig, count: int, seen: int, receipts: dict[tuple[str, str], Receipt]
) -> None:
    reason = next(r for receipt in receipts.values() for r in receipt.rejected.values())
    raise InputError(_refusal(data, count, seen, reason))


def _refusal(data: DataConfig, count: int, seen: int, reason: str) -> str:
    return (
        f"{count} of {seen} pictures in '{data.folder}' cannot be used, such as: {reason} "
        f"(data.max_rejected = {data.max_rejected:g} is the share that may be left out)"
    )


def _write_rejected(directory: Path, rejected: Rejected) -> FileInfo | None:
    """The table of what is not in the dataset."""
    if not rejected.rows:
        return None
    sources, reasons = zip(*rejected.rows, strict=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"source": sources, "reason": reasons}), sink)
    data = memoryview(sink.getvalue())
    file = FileInfo(REJECTED_NAME, len(data), sha256(data))
    atomic_write(directory / REJECTED_NAME, data)
    return file


def _print_work(receipts: dict[tuple[str, str], Receipt], lacking: dict[str, list[str]]) -> None:
    """How many rows of each group were run through models."""
    rows: dict[str, int] = {}
    for shard, groups in lacking.items():
        for group in groups:
            rows[group] = rows.get(group, 0) + receipts[shard, group].computed
    print(f"cache: computed {', '.join(f'{n} {g}' for g, n in rows.items())}", flush=True)


def _answer(work: Any) -> dict[str, list[str]]:
    """Run ``work`` in a worker; a user's mistake travels as a sentence.

    Ray would wrap it in two tracebacks.
    """
    try:
        work()
    except TinyFluxError as error:
        return {"error": [str(error)], "kind": [type(error).__name__]}
    except OSError as error:
        return {"error": [f"the cache cannot be written: {error}"], "kind": [CacheError.__name__]}
    return {"error": [""], "kind": [""]}


def _raise_known(answer: dict[str, Any]) -> None:
    import tinyflux.errors as errors

    if answer["error"]:
        raise getattr(errors, answer["kind"])(answer["error"])


def _start_ray(cache: CacheConfig) -> Any:
    import ray

    from tinyflux.distributed.ray_session import ensure_ray

    ensure_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    refuse_impossible_actor(cache)
    return ray


def refuse_impossible_actor(cache: CacheConfig) -> None:
    """An actor that no machine can hold would be waited for without end.

    A cluster may yet grow; this machine will not.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    for kind, name in (("CPU", "cpus_per_actor"), ("GPU", "gpus_per_actor")):
        most, wanted = ray.cluster_resources().get(kind, 0), getattr(cache, name)
        if wanted > most:
            raise ConfigError(f"cache.{name} is {wanted}, but this machine has {most:g} {kind}s")


class _Progress:
    """A line per piece: done, rate, time left."""

    def __init__(self, verb: str, unit: str, total: int, done: int):
        self._verb, self._unit = verb, unit
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
