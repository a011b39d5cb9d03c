"""Which samples there are, and how they are cut into shards.

A picture with several captions is as many samples. Samples of one encoded size stand in the order
of their source and are cut where their own keys say so, as backup programs cut files: a picture
that is added, edited or taken out moves the borders near it and no others.

A shard's ``rows`` file lists its samples. It is the plan for whoever encodes the shard, and a part
of the dataset.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from tinyflux.cache.config import DataConfig
from tinyflux.cache.key_set import KeySet
from tinyflux.cache.keys import Size, digest_of, sample_key
from tinyflux.cache.manifest import FileInfo
from tinyflux.cache.rejected import Rejected
from tinyflux.cache.schema import KEY, ROWS, Column, columns_of
from tinyflux.cache.shards import SHARD_FOLDER, write_group
from tinyflux.cache.sources import choose_size, size_problem
from tinyflux.cache.store import Store

Row = dict[str, str | int]


@dataclass(frozen=True)
class PlannedShard:
    """Samples that are encoded and committed together.

    Attributes:
        name: digest of their keys.
        size: width and height at which their pictures are encoded.
        file: lists them.
    """

    name: str
    rows: int
    size: Size
    file: FileInfo


def plan_shards(
    store: Store,
    data: DataConfig,
    tables: Iterable[pa.Table],
    rows_per_shard: int,
    rejected: Rejected,
) -> Iterator[PlannedShard]:
    """Cut the pictures of ``tables`` (``index.SCHEMA``) into shards and write their rows files.

    The shards that are being filled, one table and 16 bytes of each sample are held. The cut
    depends on the samples alone.
    """
    open_shards: dict[Size, list[Row]] = {}
    for size, row in _samples(data, tables, rejected):
        rows = open_shards.setdefault(size, [])
        rows.append(row)
        if _ends_shard(str(row[KEY]), len(rows), rows_per_shard):
            yield _write_rows(store, size, open_shards.pop(size))
    for size, rows in open_shards.items():
        yield _write_rows(store, size, rows)


def _ends_shard(key: str, rows: int, most: int) -> bool:
    """A border on average every ``most / 2`` samples after the first quarter."""
    if rows < max(1, most // 4):
        return False
    return rows >= most or int(key[:12], 16) % max(1, most // 2) == 0


def _samples(
    data: DataConfig, tables: Iterable[pa.Table], rejected: Rejected
) -> Iterator[tuple[Size, Row]]:
    known = KeySet()
    for table in tables:
        found: list[tuple[Size, Row]] = []
        for entry in table.to_pylist():
            rejected.seen += 1
            width, height, reason = entry["width"], entry["height"], entry["reason"]
            reason = reason or size_problem(width, height, data, entry["source"])
            if reason:
                rejected.rows.append((entry["source"], reason))
                continue
            size = choose_size(width, height, data)
            for caption in entry["captions"]:
                key = sample_key(entry["picture"], size, caption)
                row = {name: entry[name] for name in SHARED}
                found.append((size, {KEY: key, "caption": caption, **row}))
        repeated = known.add([str(row[KEY]) for _, row in found])
        rejected.duplicates += sum(repeated)
        yield from (sample for sample, again in zip(found, repeated, strict=True) if not again)


SHARED = ("picture", "mask_picture", "source", "locator", "mask_locator", "width", "height")


def _write_rows(store: Store, size: Size, rows: list[Row]) -> PlannedShard:
    keys = [str(row[KEY]) for row in rows]
    columns: dict[str, Column] = {
        name: [row[name] for row in rows]  # type: ignore[misc]
        for name in ("caption", *SHARED)
    }
    name = digest_of([list(size), keys])[:16]
    # Not the shard's name alone: a renamed file gives the same samples another list.
    path = f"{SHARD_FOLDER}/{name}.{ROWS}.{digest_of(rows)[:8]}.parquet"
    file = write_group(store, path, keys, columns_of(ROWS, columns), trim_text=False)
    return PlannedShard(name, len(rows), size, file)
