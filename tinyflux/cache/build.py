"""Building a dataset: the order of its steps, and the manifest at the end.

Pictures are indexed, cut into shards, and encoded; each column group of a shard is one file,
committed by its receipt. The manifest is written when all are there. A run that was killed anywhere
continues with what has no receipt, and a run with other pictures or models computes only what these
change.

The work itself is a :class:`Runner`'s: Ray's, or this process's own.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.claim import claim
from tinyflux.cache.committed import UNFINISHED_NAME, CommittedShards, shard_of
from tinyflux.cache.encode import ShardTask
from tinyflux.cache.estimate import ESTIMATE_NAME, Estimate, compare, read_estimate
from tinyflux.cache.fingerprints import ModelFingerprints, keep_fingerprints, known_fingerprints
from tinyflux.cache.index import INDEX_FOLDER, index_path, read_index
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.manifest import MANIFEST_NAME, CutCaptions, Manifest, ShardInfo
from tinyflux.cache.partition import PlannedShard, plan_shards
from tinyflux.cache.progress import Progress
from tinyflux.cache.receipts import Receipt, read_receipt
from tinyflux.cache.rejected import Rejected, check_rejected, unusable, write_rejected
from tinyflux.cache.runner import Runner
from tinyflux.cache.sources import SourceSplit, list_splits
from tinyflux.cache.store import Store
from tinyflux.cache.tasks import Receipts, describe_tasks, read_receipts
from tinyflux.cache.variants import with_variants
from tinyflux.errors import CacheError, ConfigError
from tinyflux.util.config import to_dict

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """What is to be in the dataset.

    Attributes:
        splits: the sources' parts, each with an index.
        rejected: pictures that are left out so far.
    """

    splits: Sequence[SourceSplit]
    models: ModelFingerprints
    shards: Sequence[PlannedShard]
    rejected: Rejected

    @property
    def fingerprints(self) -> dict[str, str]:
        """``GroupInfo.fingerprint`` by column group."""
        return {group: info.fingerprint for group, info in self.models.recipe.groups.items()}


def estimate(configs: BuildConfigs, runner: Runner) -> Estimate:
    """Predict what a build from scratch would take, from a few batches.

    The pictures are indexed for it, which the build will not do again; the prediction is kept
    beside the dataset, and compared with what comes true.
    """
    with _planned(configs, runner) as plan:
        largest = max(plan.shards, key=lambda shard: shard.rows)
        cost = runner.measure(
            ShardTask(largest.name, largest.size, largest.file.path, plan.fingerprints, {})
        )
        sizes: dict[str, int] = {}
        for shard in plan.shards:
            name = f"{shard.size[0]} x {shard.size[1]}"
            sizes[name] = sizes.get(name, 0) + shard.rows
        actors = min(configs.cache.num_actors, len(plan.shards))
        made = Estimate(sum(sizes.values()), len(plan.shards), actors, sizes, largest.size, cost)
        configs.store.write(ESTIMATE_NAME, json.dumps(to_dict(made), indent=1).encode())
    rejected = plan.rejected
    if rejected.rows:
        logger.info("cache: %d of %d pictures cannot be used", len(rejected.rows), rejected.seen)
    return made


def build(configs: BuildConfigs, runner: Runner) -> Manifest:
    """Build the dataset at ``cache.path``, or what is missing of it or has changed.

    Raises:
        InputError: more pictures than ``data.max_rejected`` cannot be used.
        CacheError: ``cache.path`` is not a build job's, or cannot be written.
    """
    with _planned(configs, runner) as plan:
        check_rejected(configs.data, len(plan.rejected.rows), plan.rejected)
        receipts = _encode(configs, runner, plan)
        manifest = _commit(configs, plan, receipts)
    if manifest.cut_captions:
        how = "data.long_captions: reject leaves them out"
        logger.info("cache: %s (%s)", manifest.cut_captions, how)
    logger.info(
        "cache: %d rows in %d shards at %s", manifest.rows, len(manifest.shards), configs.cache.path
    )
    return manifest


@contextmanager
def _planned(configs: BuildConfigs, runner: Runner) -> Iterator[Plan]:
    """Index the pictures, look at the models and cut shards, with the directory locked."""
    data, store = configs.data, configs.store
    if not configs.cache.path:
        raise ConfigError("cache.path is not set: name the directory of the dataset")
    splits = list_splits(data)
    try:
        with claim(store):
            models = _index_and_look_at_models(configs, runner, splits)
            recipe = with_variants(models.recipe, data.variants, configs.cache.seed)
            rejected = Rejected()
            index = (read_index(store, data, split) for split in splits)
            size = configs.cache.rows_per_shard
            shards = list(plan_shards(store, data, index, size, rejected))
            if not shards:
                check_rejected(data, len(rejected.rows), rejected)
            yield Plan(splits, replace(models, recipe=recipe), shards, rejected)
    except OSError as error:
        raise CacheError(
            f"the cache at '{store.location}' cannot be written ({error}): mend that, and run the "
            f"same command again to continue"
        ) from error


def _index_and_look_at_models(
    configs: BuildConfigs, runner: Runner, splits: Sequence[SourceSplit]
) -> ModelFingerprints:
    """Index the parts that are not, and find out what the models are; both at once."""
    data, indexed = configs.data, configs.store.list(INDEX_FOLDER)
    missing = [split for split in splits if index_path(data, split) not in indexed]
    models = known_fingerprints(configs)
    pending = runner.prepare() if models is None else None
    if missing:
        progress = Progress(runner, "indexed", "units", len(splits), len(splits) - len(missing))
        for _ in runner.index(missing):
            progress.add(1)
    if pending is not None:
        models = pending()
        keep_fingerprints(configs, models)
    assert models is not None
    return models


def _encode(configs: BuildConfigs, runner: Runner, plan: Plan) -> Receipts:
    """Receipts of every planned file; what has none is made."""
    store, fingerprints = configs.store, plan.fingerprints
    receipts = read_receipts(store, plan.shards, fingerprints)
    committed = CommittedShards(store, configs.data, plan.models, plan.shards, fingerprints)
    committed.begin(receipts)
    lacking: dict[str, list[str]] = {}
    for shard in plan.shards:
        if missing := [group for group in fingerprints if (shard.name, group) not in receipts]:
            lacking[shard.name] = missing
    if not lacking:
        return receipts
    rows = {shard.name: shard.rows for shard in plan.shards}
    total, left = sum(rows.values()), sum(rows[name] for name in lacking)
    if receipts:
        logger.info("cache: %d of %d rows are there as they should be", total - left, total)
    tasks = describe_tasks(store, plan.shards, lacking, fingerprints)
    progress = Progress(runner, "encoded", "rows", total, total - left)
    failed = len(plan.rejected.rows)
    for name in runner.encode(tasks):
        made = [_receipt_of(store, name, group, fingerprints[group]) for group in lacking[name]]
        receipts.update({(name, receipt.group): receipt for receipt in made})
        dropped = unusable(configs.data, made)
        failed += len(dropped)
        check_rejected(configs.data, failed, plan.rejected, *dropped.values())
        committed.add(name, receipts)
        progress.add(rows[name])
    if len(receipts) != len(plan.shards) * len(fingerprints):
        raise CacheError("not every shard was built: run the job again to continue")
    _log_work(receipts, lacking)
    if len(lacking) == len(plan.shards):
        _compare_with_estimate(store, receipts)
    return receipts


def _receipt_of(store: Store, shard: str, group: str, fingerprint: str) -> Receipt:
    """The receipt of a file that was reported to be made."""
    receipt = read_receipt(store, shard, group, fingerprint)
    if receipt is None:
        raise CacheError(
            f"shard {shard} was written but is not whole at '{store.location}': is that "
            f"directory shared by all nodes?"
        )
    return receipt


def _log_work(receipts: Receipts, lacking: Mapping[str, Sequence[str]]) -> None:
    """Log how many rows of each group were run through models."""
    rows: dict[str, int] = {}
    for shard, groups in lacking.items():
        for group in groups:
            rows[group] = rows.get(group, 0) + receipts[shard, group].computed
    logger.info("cache: computed %s", ", ".join(f"{n} {g}" for g, n in rows.items()))


def _compare_with_estimate(store: Store, receipts: Receipts) -> None:
    """Log how a build from scratch went, against what was predicted, if it was."""
    expected = read_estimate(store)
    if expected is None:
        return
    sizes: dict[str, int] = {}
    for (_, group), receipt in receipts.items():
        sizes[group] = sizes.get(group, 0) + (receipt.file.bytes if receipt.file else 0)
    logger.info("%s", compare(expected, sizes, receipts.values()))


def _commit(configs: BuildConfigs, plan: Plan, receipts: Receipts) -> Manifest:
    """Write the manifest, unless it says the same already."""
    store, rejected = configs.store, plan.rejected
    shards: list[ShardInfo] = []
    clip = t5 = 0
    for shard in plan.shards:
        own = {group: receipts[shard.name, group] for group in plan.fingerprints}
        reasons = unusable(configs.data, own.values())
        kept = [cut for cut in own["text"].cut_rows if cut[0] not in reasons]
        clip += sum(by_clip > 0 for _, by_clip, _ in kept)
        t5 += sum(by_t5 > 0 for _, _, by_t5 in kept)
        rejected.rows += _with_sources(store, shard, reasons)
        if (listed := shard_of(shard, own, reasons)) is not None:
            shards.append(listed)
    check_rejected(configs.data, len(rejected.rows), rejected)
    if rejected.duplicates:
        logger.info("cache: %d samples are listed twice and kept once", rejected.duplicates)
    manifest = Manifest(
        rows=sum(shard.samples for shard in shards),
        recipe=plan.models.recipe,
        shards=tuple(shards),
        null_text=plan.models.null_text,
        rejected=write_rejected(store, rejected),
        index=tuple(index_path(configs.data, split) for split in plan.splits),
        name=store.name,
        built=True,
        cut_captions=CutCaptions(clip, t5) if clip or t5 else None,
    )
    if store.size(MANIFEST_NAME) is None or store.read(MANIFEST_NAME) != manifest.to_json():
        manifest.save(store)
    store.delete(UNFINISHED_NAME)
    return manifest


def _with_sources(
    store: Store, shard: PlannedShard, reasons: Mapping[int, str]
) -> Iterable[tuple[str, str]]:
    """Where the rows of ``reasons`` are from, for people, each with its reason."""
    if not reasons:
        return []
    table = pq.read_table(pa.BufferReader(store.read(shard.file.path)), columns=["source"])
    sources = table["source"].to_pylist()
    return [(sources[row], reasons[row]) for row in sorted(reasons)]
