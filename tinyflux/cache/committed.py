"""What of a dataset is committed while its build is still at work.

``unfinished.json`` is a manifest of the shards that are whole so far. A build keeps it from its
first whole shard on until it writes the manifest itself, which is all that other readers know.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tinyflux.cache.config import DataConfig
from tinyflux.cache.fingerprints import ModelFingerprints
from tinyflux.cache.keys import digest_of
from tinyflux.cache.manifest import BUILD_MARK, MANIFEST_NAME, Manifest, ShardInfo
from tinyflux.cache.partition import PlannedShard
from tinyflux.cache.receipts import Receipt
from tinyflux.cache.rejected import unusable
from tinyflux.cache.schema import ROWS
from tinyflux.cache.store import Store
from tinyflux.cache.tasks import Receipts
from tinyflux.errors import CacheError

UNFINISHED_NAME = "unfinished.json"
# It is written anew when its rows have grown by this share: in all about so many times its size.
GROWTH = 1 / 16


def shard_of(
    planned: PlannedShard, receipts: Mapping[str, Receipt], left_out: Collection[int]
) -> ShardInfo | None:
    """A shard as the manifest lists it; None where no row is left of it.

    Args:
        receipts: by column group.
        left_out: rows that are not in the dataset (see :func:`unusable`).
    """
    if len(left_out) == planned.rows:
        return None
    files = {group: found.file for group, found in receipts.items() if found.file is not None}
    dropped = tuple(sorted(left_out))
    return ShardInfo(planned.name, planned.rows, {ROWS: planned.file, **files}, dropped)


class CommittedShards:
    """Keeps ``unfinished.json`` current, unless the dataset has a manifest already.

    Args:
        planned: all shards of the build.
        groups: column groups that each of them is to have.
    """

    def __init__(
        self,
        store: Store,
        data: DataConfig,
        models: ModelFingerprints,
        planned: Sequence[PlannedShard],
        groups: Collection[str],
    ):
        self._store, self._data, self._models = store, data, models
        self._planned = {shard.name: shard for shard in planned}
        self._groups = tuple(groups)
        self._shards: list[ShardInfo] = []
        self._rows = self._written = 0
        self._wanted = store.size(MANIFEST_NAME) is None

    def begin(self, receipts: Receipts) -> None:
        """List what an earlier build has left, and nothing that is of other pictures or models."""
        if not self._wanted:
            return
        for name in self._planned:
            if all((name, group) in receipts for group in self._groups):
                self._take(name, receipts)
        if self._rows:
            self._write_if_due()
        else:
            self._store.delete(UNFINISHED_NAME)

    def add(self, name: str, receipts: Receipts) -> None:
        """List a shard whose files are all there."""
        if self._wanted:
            self._take(name, receipts)
            self._write_if_due()

    def _take(self, name: str, receipts: Receipts) -> None:
        own = {group: receipts[name, group] for group in self._groups}
        shard = shard_of(self._planned[name], own, unusable(self._data, own.values()))
        if shard is not None:
            self._shards.append(shard)
            self._rows += shard.samples

    def _write_if_due(self) -> None:
        if self._rows <= self._written * (1 + GROWTH):
            return
        manifest = Manifest(
            rows=self._rows,
            recipe=self._models.recipe,
            shards=tuple(self._shards),
            null_text=self._models.null_text,
            name=self._store.name,
            built=True,
        )
        self._store.write(UNFINISHED_NAME, manifest.to_json())
        self._written = self._rows


def load_committed(store: Store) -> tuple[Manifest, bool]:
    """What is committed of a dataset, and whether that is all of it.

    Raises:
        CacheError: nothing is, or what says so is damaged.
    """
    if store.size(MANIFEST_NAME) is None:
        try:
            return Manifest.load(store, UNFINISHED_NAME), False
        except CacheError:
            # Else there is nothing yet, or the build has ended just now.
            if store.size(UNFINISHED_NAME) is not None:
                raise
        if store.size(MANIFEST_NAME) is None and store.size(BUILD_MARK) is not None:
            raise CacheError(
                f"the cache '{store.location}' has no whole shard yet: start again when its build "
                "has made some"
            )
    return Manifest.load(store), True


def shard_id(shard: ShardInfo) -> str:
    """What a run knows a shard by: its samples, and the numbers that were made of them.

    Names of picture files may change.
    """
    made = sorted((group, file.sha256) for group, file in shard.files.items() if group != ROWS)
    return f"{shard.name}-{digest_of([made, list(shard.dropped)])[:16]}"


def with_shards(manifest: Manifest, ids: Sequence[str], location: str) -> Manifest:
    """The same dataset with these of its shards, in this order.

    Args:
        location: of the dataset, for errors.

    Raises:
        CacheError: it lists one of them no more.
    """
    listed = {shard_id(shard): shard for shard in manifest.shards}
    missing = [one for one in ids if one not in listed]
    if missing:
        raise CacheError(
            f"the cache '{location}' does not list {len(missing)} of the {len(ids)} shards that "
            f"the run reads, such as {missing[0]}: it was built with other pictures, models or "
            "settings; build it as it was, or use a new run_dir"
        )
    shards = tuple(listed[one] for one in ids)
    return replace(manifest, rows=sum(shard.samples for shard in shards), shards=shards)
