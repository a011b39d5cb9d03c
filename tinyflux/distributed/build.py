"""The job that builds a dataset: Ray Data around :mod:`tinyflux.cache.extract`.

The samples are cut into shards in a fixed order. Each shard is one row of a Ray dataset; an actor
encodes it, writes its files and then a receipt. The manifest is written when every shard has one. A
run that was killed anywhere continues with the shards that have no receipt.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyflux.cache.extract import CacheConfig, Extractor, extractor_for, settings_of
from tinyflux.cache.manifest import Manifest, Recipe, ShardInfo
from tinyflux.cache.shards import is_whole, write_null_text, write_shard
from tinyflux.cache.sources import DataConfig, Source, list_sources, read_samples
from tinyflux.errors import CacheError, ConfigError, TinyFluxError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.zoo import ZooConfig
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write

PLAN_NAME, RECEIPT_FOLDER = "plan.json", "receipts"


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
    _claim(directory, plan, settings)
    if (directory / "manifest.json").exists():
        manifest = Manifest.load(directory)
        print(f"cache: {manifest.rows} rows are already at {directory}", flush=True)
        return manifest

    size = cache.rows_per_shard
    shards = {
        f"{number:05d}": sources[start : start + size]
        for number, start in enumerate(range(0, len(sources), size))
    }
    receipts = {name: r for name in shards if (r := _read_receipt(directory, name)) is not None}
    done = sum(receipt.rows for receipt, _ in receipts.values())
    if receipts:
        print(f"cache: continuing, {done} of {len(sources)} rows are there", flush=True)
    missing = {name: rows for name, rows in shards.items() if name not in receipts}
    progress = _Progress(len(sources), done)
    for answer in _run_actors(missing, data, zoo, cache, model):
        if answer["error"]:
            raise _known_error(answer["kind"], answer["error"])
        receipt = _read_receipt(directory, answer["name"])
        if receipt is None:
            raise CacheError(
                f"shard {answer['name']} was written but is not whole at '{directory}': is that "
                f"directory shared by all nodes?"
            )
        receipts[answer["name"]] = receipt
        progress.add(receipt[0].rows)

    if set(receipts) != set(shards):
        raise CacheError("Ray ended before every shard was built: run the job again to continue")
    recipes = [recipe for _, recipe in receipts.values()]
    if any(recipe != recipes[0] for recipe in recipes):
        raise CacheError(
            f"shards at '{directory}' were made by different weights: delete it and build again"
        )
    null_text = write_null_text(directory, *_null_text(zoo, model))
    manifest = Manifest(
        rows=len(sources),
        recipe=recipes[0],
        shards=tuple(receipts[name][0] for name in shards),
        null_text=null_text,
        name=directory.name,
        plan=plan,
        settings=settings,
    )
    manifest.save(directory)
    print(f"cache: {manifest.rows} rows in {len(shards)} shards at {directory}", flush=True)
    return manifest


def _null_text(zoo: ZooConfig, model: TinyFluxConfig) -> tuple[Any, Any]:
    t5, pooled = Extractor(zoo.build(model)).text([""], allow_empty=True)
    return t5[0], pooled[0]


def _claim(directory: Path, plan: str, settings: dict[str, Any]) -> None:
    """Make ``directory`` this plan's, or say how it is another's."""
    path = directory / PLAN_NAME
    try:
        (directory / RECEIPT_FOLDER).mkdir(parents=True, exist_ok=True)
        for leftover in directory.rglob(".*.tmp"):  # of writers that were killed
            leftover.unlink(missing_ok=True)
        if not path.exists():
            content = json.dumps({"plan": plan, "settings": settings}, indent=1)
            atomic_write(path, content.encode())
            return
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"cache.path '{directory}' cannot be used: {error}") from error
    if found["plan"] == plan:
        return
    for name, value in settings.items():
        if found["settings"].get(name) != value:
            raise CacheError(
                f"'{directory}' holds a cache made with {name} = {found['settings'].get(name)!r}, "
                f"this run has {value!r}: use another cache.path, or delete it"
            )
    raise CacheError(
        f"'{directory}' holds a cache of other pictures or captions than are in "
        f"'{settings['data.folder']}' now: use another cache.path, or delete it"
    )


def _read_receipt(directory: Path, name: str) -> tuple[ShardInfo, Recipe] | None:
    """A shard that is complete, else None."""
    try:
        data = json.loads((directory / RECEIPT_FOLDER / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return None
    shard = ShardInfo.from_dict(data["shard"])
    if not all(is_whole(directory, file) for file in shard.files.values()):
        return None
    return shard, Recipe.from_dict(data["recipe"])


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
            self._write(name, [Source(*row) for row in json.loads(str(batch["sources"][0]))])
        except (TinyFluxError, OSError) as caught:
            # A user's mistake travels as a sentence; Ray would wrap it in two tracebacks.
            error, kind = str(caught), type(caught).__name__
        return {"name": [name], "error": [error], "kind": [kind]}

    def _write(self, name: str, sources: list[Source]) -> None:
        directory = Path(self._cache.path)
        if self._extractor is None:
            zoo = self._zoo.build(self._model)
            self._extractor = extractor_for(zoo, self._cache)
        samples = read_samples(self._data, sources)
        shard = write_shard(
            directory,
            name,
            [sample.key for sample in samples],
            self._extractor(samples),
            trim_text=self._model.text_padding == "zero",
        )
        receipt = {"shard": to_dict(shard), "recipe": to_dict(self._extractor.recipe())}
        path = directory / RECEIPT_FOLDER / f"{name}.json"
        atomic_write(path, json.dumps(receipt).encode())


def _run_actors(
    shards: dict[str, list[Source]],
    data: DataConfig,
    zoo: ZooConfig,
    cache: CacheConfig,
    model: TinyFluxConfig,
) -> Iterator[dict[str, Any]]:
    """One answer per shard, as shards are done."""
    if not shards:
        return
    import ray

    from tinyflux.distributed.ray_session import ensure_ray

    ensure_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    actors = min(cache.num_actors, len(shards))
    rows = [
        {
            "name": name,
            "sources": json.dumps([[s.path, s.caption, s.bytes, s.modified] for s in part]),
        }
        for name, part in shards.items()
    ]
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


def _known_error(kind: str, message: str) -> Exception:
    import tinyflux.errors as errors

    cls = getattr(errors, kind, CacheError)
    return cls(message if cls is not CacheError else f"the cache cannot be written: {message}")


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
