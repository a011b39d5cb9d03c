"""What is left to make: planned shards less the receipts that are there."""

from collections.abc import Iterable, Mapping, Sequence

from tinyflux.cache.encode import ShardTask
from tinyflux.cache.partition import PlannedShard
from tinyflux.cache.receipts import RECEIPT_FOLDER, Receipt, read_receipt, receipt_path
from tinyflux.cache.reuse import ReusableRows, Reused
from tinyflux.cache.store import Store

Receipts = dict[tuple[str, str], Receipt]  # by shard and group


def read_receipts(
    store: Store, planned: Iterable[PlannedShard], fingerprints: Mapping[str, str]
) -> Receipts:
    """Those of the planned files that are there."""
    there = store.list(RECEIPT_FOLDER)
    wanted = (
        (shard.name, group, fingerprint)
        for shard in planned
        for group, fingerprint in fingerprints.items()
        if receipt_path(shard.name, group, fingerprint) in there
    )
    receipts = store.each(lambda one: read_receipt(store, *one), wanted)
    return {(found.shard, found.group): found for found in receipts if found is not None}


def describe_tasks(
    store: Store,
    planned: Sequence[PlannedShard],
    lacking: Mapping[str, list[str]],
    fingerprints: Mapping[str, str],
) -> list[ShardTask]:
    """What is to be made of the shards that lack groups, and what of it is known already."""
    there = store.list(RECEIPT_FOLDER)
    outdated = {
        shard.name
        for shard in planned
        for group in lacking.get(shard.name, ())
        if receipt_path(shard.name, group, fingerprints[group]) in there
    }
    former = ReusableRows(store, fingerprints, {shard.name for shard in planned} - outdated)
    found = []
    for shard in planned:
        reused: dict[str, Reused] = {}
        for group in lacking.get(shard.name, ()):
            reused[group] = former.find(group, shard.file.path, shard.size)
        if reused:
            wanted = {group: fingerprints[group] for group in reused}
            found.append(ShardTask(shard.name, shard.size, shard.file.path, wanted, reused))
    return found
