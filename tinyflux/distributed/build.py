"""The job that builds a dataset: Ray Data around :mod:`tinyflux.cache.extract`.

The samples are cut into shards in a fixed order. Each shard is one row of a Ray dataset; an actor
encodes it, writes its files and then a receipt. The manifest is written when every shard has one. A
run that was killed anywhere continues with the shards that have no receipt, or whose pictures or
captions are others by now.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tinyflux.cache.extract import CacheConfig, extractor_for, settings_of
from tinyflux.cache.manifest import MANIFEST_NAME, FileInfo, Manifest, Recipe, ShardInfo
from tinyflux.cache.shards import is_whole, write_null_text, write_shard
from tinyflux.cache.sources import DataConfig, Source, list_sources, read_samples
from tinyflux.errors import CacheError, ConfigError, TinyFluxError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.zoo import ZooConfig
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write

PLAN_NAME, RECEIPT_FOLDER = "plan.json", "receipts"
FIRST_SHARD = "00000"  # its actor writes the empty caption's embedding as well


class Receipt(NamedTuple):
    """What an actor says of a shard that it has written whole.

    Attributes:
        samples: digest of the sources that it encoded.
        null_text: the empty caption's embedding, with the first shard only.
    """

    samples: str
    shard: ShardInfo
    recipe: Recipe
    null_text: FileInfo | None


def build_cache(
    data: DataConfig, zoo: ZooConfig, cache: CacheConfig, model: TinyFluxConfig
) -> Manifest:
    """Build the dataset at ``cache.path``, or what is missing of it.

    Raises:
        InputError: a picture or caption that cannot be used.
        CacheError: ``cache.path`` holds a dataset of other settings or samples, or cannot be
            written.
    """
    if not cache.path:
        raise ConfigError("cache.path is not set: name the directory of the dataset")
    directory = Path(cache.path)
    sources = list_sources(data)
    settings = to_dict(settings_of(data, zoo, cache))
    settings.update(
        {
            f"model.{name}": to_dict(getattr(model, name))
            for name in ("t5_layers", "max_text_length", "text_padding", "latent_shift")
        }
    )
    plan = _digest([settings, [[s.path, s.caption, s.bytes, s.modified] for s in sources]])
    finished = _claim(directory, plan, settings)
    if finished is not None:
        print(f"cache: {finished.rows} rows are already at {directory}", flush=True)
        return finished

    size = cache.rows_per_shard
    shards = {
        f"{number:05d}": _pack(sources[start : start + size])
        for number, start in enumerate(range(0, len(sources), size))
    }
    receipts: dict[str, Receipt] = {}
    for name, packed in shards.items():
        if (receipt := _read_receipt(directory, name, packed)) is not None:
            receipts[name] = receipt
    done = sum(receipt.shard.rows for receipt in receipts.values())
    if receipts:
        print(f"cache: continuing, {done} of {len(sources)} rows are there", flush=True)
    missing = {name: rows for name, rows in shards.items() if name not in receipts}
    progress = _Progress(len(sources), done)
    for answer in _run_actors(missing, data, zoo, cache, model):
        if answer["error"]:
            raise _known_error(answer["kind"], answer["error"])
        receipt = _read_receipt(directory, answer["name"], shards[answer["name"]])
        if receipt is None:
            raise CacheError(
                f"shard {answer['name']} was written but is not whole at '{directory}': is that "
                f"directory shared by all nodes?"
            )
        receipts[answer["name"]] = receipt
        progress.add(receipt.shard.rows)

    if set(receipts) != set(shards):
        raise CacheError("Ray ended before every shard was built: run the job again to continue")
    first = receipts[FIRST_SHARD]
    if any(receipt.recipe != first.recipe for receipt in receipts.values()):
        raise CacheError(
            f"shards at '{directory}' were made by different weights: delete it and build again"
        )
    manifest = Manifest(
        rows=len(sources),
        recipe=first.recipe,
        shards=tuple(receipts[name].shard for name in shards),
        null_text=first.null_text,
        name=directory.name,
        plan=plan,
        settings=settings,
    )
    manifest.save(directory)
    print(f"cache: {manifest.rows} rows in {len(shards)} shards at {directory}", flush=True)
    return manifest


def _claim(directory: Path, plan: str, settings: dict[str, Any]) -> Manifest | None:
    """Make ``directory`` this plan's, or say how it is another's.

    Returns:
        The dataset, if this very plan has been built there.
    """
    if (directory / MANIFEST_NAME).exists():
        manifest = Manifest.load(directory)
        if manifest.plan == plan:
            return manifest
        if not manifest.plan:
            raise CacheError(
                f"'{directory}' holds a dataset that no build job made: use another cache.path"
            )
        _refuse_other_settings(directory, manifest.settings, settings)
        raise CacheError(
            f"'{directory}' holds a cache of other pictures or captions than are in "
            f"'{settings['data.folder']}' now: use another cache.path, or delete it"
        )
    path = directory / PLAN_NAME
    try:
        if path.exists():
            _refuse_other_settings(directory, json.loads(path.read_bytes())["settings"], settings)
        elif directory.exists() and not all(
            entry.match(f".{PLAN_NAME}.*.tmp") for entry in directory.iterdir()
        ):
            raise CacheError(
                f"cache.path '{directory}' holds other files and no cache: name a new or empty "
                f"directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        # First, so that whatever else is found here later is known to be this cache's.
        atomic_write(path, json.dumps({"settings": settings}, indent=1).encode())
        (directory / RECEIPT_FOLDER).mkdir(exist_ok=True)
        for leftover in directory.rglob(".*.tmp"):  # of writers that were killed
            leftover.unlink(missing_ok=True)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"cache.path '{directory}' cannot be used: {error}") from error
    return None


def _refuse_other_settings(
    directory: Path, found: dict[str, Any], settings: dict[str, Any]
) -> None:
    for name, value in settings.items():
        if found.get(name) != value:
            raise CacheError(
                f"'{directory}' holds a cache made with {name} = {found.get(name)!r}, "
                f"this run has {value!r}: use another cache.path, or delete it"
            )


def _pack(sources: list[Source]) -> str:
    """A shard's sources as an actor gets them."""
    return json.dumps([[s.path, s.caption, s.bytes, s.modified] for s in sources])


def _read_receipt(directory: Path, name: str, packed: str) -> Receipt | None:
    """A shard that is complete and was made of these very sources, else None."""
    try:
        data = json.loads((directory / RECEIPT_FOLDER / f"{name}.json").read_bytes())
        null_text = data["null_text"]
        receipt = Receipt(
            samples=data["samples"],
            shard=ShardInfo.from_dict(data["shard"]),
            recipe=Recipe.from_dict(data["recipe"]),
            null_text=None if null_text is None else FileInfo.from_dict(null_text),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    files = [*receipt.shard.files.values(), *filter(None, [receipt.null_text])]
    whole = all(is_whole(directory, file) for file in files)
    return receipt if whole and receipt.samples == _digest(packed) else None


class ShardEncoder:
    """The actor: holds the models, turns a shard's sources into files and a receipt."""

    def __init__(self, configs: dict[str, Any]):
        import torch

        self._data = from_dict(DataConfig, configs["data"], "data")
        self._cache = from_dict(CacheConfig, configs["cache"], "cache")
        self._model = TinyFluxConfig.from_dict(configs["model"])
        self._zoo = from_dict(ZooConfig, configs["zoo"], "zoo")
        torch.set_num_threads(max(1, int(self._cache.cpus_per_actor)))
        self._extractor: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        name = str(batch["name"][0])
        error = kind = ""
        try:
            self._write(name, str(batch["sources"][0]))
        # A user's mistake travels as a sentence; Ray would wrap it in two tracebacks.
        except TinyFluxError as caught:
            error, kind = str(caught), type(caught).__name__
        except OSError as caught:
            error, kind = f"the cache cannot be written: {caught}", CacheError.__name__
        return {"name": [name], "error": [error], "kind": [kind]}

    def _write(self, name: str, packed: str) -> None:
        directory, size = Path(self._cache.path), self._cache.batch_size
        sources = [Source(*row) for row in json.loads(packed)]
        if self._extractor is None:
            zoo = self._zoo.build(self._model)
            self._extractor = extractor_for(zoo, self._cache)
        # Decoded pictures are large: no more than a batch of them is ever held.
        batches = (sources[start : start + size] for start in range(0, len(sources), size))
        keys, columns = self._extractor.join(read_samples(self._data, part) for part in batches)
        trim = self._model.text_padding == "zero"
        shard = write_shard(directory, name, keys, columns, trim_text=trim)
        null_text = None
        if name == FIRST_SHARD:
            t5, pooled = self._extractor.text([""], allow_empty=True)
            null_text = write_null_text(directory, t5[0], pooled[0])
        receipt = Receipt(_digest(packed), shard, self._extractor.recipe(), null_text)
        path = directory / RECEIPT_FOLDER / f"{name}.json"
        atomic_write(path, json.dumps(to_dict(receipt._asdict())).encode())


def _run_actors(
    shards: dict[str, str],
    data: DataConfig,
    zoo: ZooConfig,
    cache: CacheConfig,
    model: TinyFluxConfig,
) -> Iterator[dict[str, Any]]:
    """One answer per shard (its packed sources by name), as shards are done."""
    if not shards:
        return
    import ray

    from tinyflux.distributed.ray_session import ensure_ray

    ensure_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    refuse_impossible_actor(cache)
    actors = min(cache.num_actors, len(shards))
    rows = [{"name": name, "sources": packed} for name, packed in shards.items()]
    configs = {
        "data": to_dict(data),
        "zoo": to_dict(zoo),
        "cache": to_dict(cache),
        "model": model.to_dict(),
    }
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardEncoder,
        fn_constructor_args=[configs],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cache.cpus_per_actor,
        num_gpus=cache.gpus_per_actor or None,
    )
    yield from answers.iter_rows()


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


def _known_error(kind: str, message: str) -> Exception:
    import tinyflux.errors as errors

    return getattr(errors, kind)(message)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Progress:
    """A line per shard: rows, rows/s, time left."""

    def __init__(self, total: int, done: int):
        self._total, self._done, self._first = total, done, done
        self._started = time.monotonic()

    def add(self, rows: int) -> None:
        self._done += rows
        seconds = time.monotonic() - self._started
        rate = (self._done - self._first) / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        print(
            f"cache: {self._done}/{self._total} rows  {rate:.1f} rows/s  {left:.0f} s left",
            flush=True,
        )
