"""The job that builds a dataset: Ray does the work of :mod:`tinyflux.cache.build`.

Units of pictures are indexed by tasks, shards are encoded by a pool of actors that hold the models.
Both are Ray Data pipelines, so they show in Ray's dashboard, take any node that joins, and give the
work of a process that died to another.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tinyflux.cache.build import (
    build,
    estimate,
)
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.encode import ShardEncoder, ShardTask
from tinyflux.cache.estimate import Cost, Estimate
from tinyflux.cache.fingerprints import ModelFingerprints, take_fingerprints
from tinyflux.cache.index import write_index
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.receipts import read_receipt
from tinyflux.cache.runner import measure_task
from tinyflux.cache.sources import SourceSplit
from tinyflux.distributed.metrics import Gauges
from tinyflux.distributed.relay import answer, value_of
from tinyflux.errors import CacheError, ConfigError
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.logging import log_to_console

# Shards above these numbers share blocks. Few enough for the driver, enough to keep actors alike
# busy to the end; receipts commit each shard all the same.
MOST_BLOCKS, BLOCKS_PER_ACTOR = 4096, 8


def plan_cache(
    data: DataConfig, zoo: ZooConfig, cache: CacheConfig, model: TinyFluxConfig
) -> Estimate:
    """Measure a few batches on Ray; see :func:`tinyflux.cache.build.estimate`."""
    configs = BuildConfigs.begin(data, zoo, cache, model)
    return estimate(configs, RayRunner(configs))


def build_cache(
    data: DataConfig, zoo: ZooConfig, cache: CacheConfig, model: TinyFluxConfig
) -> Manifest:
    """Build the dataset at ``cache.path`` on Ray; see :func:`tinyflux.cache.build.build`."""
    configs = BuildConfigs.begin(data, zoo, cache, model)
    return build(configs, RayRunner(configs))


class RayRunner:
    """A :class:`tinyflux.cache.runner.Runner`; Ray is started by the first thing there is to do."""

    def __init__(self, configs: BuildConfigs):
        self._configs, self._packed = configs, to_dict(configs)
        self._gauges = Gauges("cache", configs.store.name)

    def prepare(self) -> Callable[[], ModelFingerprints]:
        made = self._start(_prepare, self._packed)
        return lambda: from_dict(ModelFingerprints, made(), "the models' description")

    def measure(self, task: ShardTask) -> Cost:
        made = self._start(_measure, self._packed, json.dumps(to_dict(task)))
        return from_dict(Cost, made(), "the cost")

    def _start(self, work: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Run ``work`` where an actor would; the answer waits for it."""
        ray, cache = _start_ray(self._configs.cache), self._configs.cache
        task = ray.remote(work).options(
            num_cpus=cache.cpus_per_actor, num_gpus=cache.gpus_per_actor
        )
        pending = task.remote(*arguments)
        return lambda: value_of(ray.get(pending))

    def index(self, units: Sequence[SourceSplit]) -> Iterator[None]:
        rows = [{"unit": json.dumps(to_dict(unit))} for unit in units]
        ray = _start_ray(self._configs.cache)
        answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _index, batch_size=1, fn_args=[self._packed], num_cpus=1
        )
        for answered in answers.iter_rows():
            yield value_of(answered)

    def encode(self, tasks: Sequence[ShardTask]) -> Iterator[str]:
        cache = self._configs.cache
        rows = [{"task": json.dumps(to_dict(task))} for task in tasks]
        ray = _start_ray(cache)
        # Ray Data spends some ten milliseconds of the driver on each block.
        blocks = min(len(rows), max(MOST_BLOCKS, BLOCKS_PER_ACTOR * cache.num_actors))
        answers = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _ShardActor,
            fn_constructor_args=[self._packed],
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(cache.num_actors, len(rows))),
            num_cpus=cache.cpus_per_actor,
            num_gpus=cache.gpus_per_actor or None,
        )
        for answered in answers.iter_rows():
            yield value_of(answered)

    def show(self, unit: str, done: int, total: int, rate: float) -> None:
        _start_ray(self._configs.cache)
        self._gauges.set(**{unit: done, f"{unit}_in_all": total, f"{unit}_per_s": rate})


def _prepare(packed: dict[str, Any]) -> dict[str, Any]:
    configs = _unpack(packed)
    return _single(_answer(lambda: take_fingerprints(configs, configs.encoder().extractor)))


def _measure(packed: dict[str, Any], task: str) -> dict[str, Any]:
    configs, work = _unpack(packed), from_dict(ShardTask, json.loads(task), "a task")
    return _single(_answer(lambda: measure_task(configs, work)))


def _single(answer: dict[str, list[str]]) -> dict[str, str]:
    return {name: column[0] for name, column in answer.items()}


def _index(batch: dict[str, Any], packed: dict[str, Any]) -> dict[str, list[str]]:
    configs = _unpack(packed)
    unit = from_dict(SourceSplit, json.loads(str(batch["unit"][0])), "a unit")
    return _answer(lambda: write_index(configs.store, configs.data, unit))


class _ShardActor:
    """Holds the models, which the first task loads."""

    def __init__(self, packed: dict[str, Any]):
        self._configs = _unpack(packed)
        self._encoder: ShardEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return _answer(lambda: self._encode(str(batch["task"][0])))

    def _encode(self, packed: str) -> str:
        task = from_dict(ShardTask, json.loads(packed), "a task")
        if all(
            read_receipt(self._configs.store, task.name, group, fingerprint)
            for group, fingerprint in task.fingerprints.items()
        ):
            return task.name  # by an actor that died later in the same block
        if self._encoder is None:
            self._encoder = self._configs.encoder()
        self._encoder(task)
        return task.name


def _unpack(packed: dict[str, Any]) -> BuildConfigs:
    """What to build, in a worker, whose lines Ray takes to the driver's console."""
    log_to_console()
    return from_dict(BuildConfigs, packed, "the build's configs")


def _answer(work: Callable[[], Any]) -> dict[str, list[str]]:
    """Do ``work`` in a worker; see :func:`tinyflux.distributed.relay.answer`."""
    return answer(work, "the cache cannot be written", CacheError)


def _start_ray(cache: CacheConfig) -> Any:
    import ray

    from tinyflux.distributed.ray_session import ensure_ray, quiet_data

    ensure_ray()
    quiet_data()
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
