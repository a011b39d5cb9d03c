"""Which samples there are, and how they are cut into shards.

A picture with several captions is as many samples. Samples of one encoded size stand in the order
of their source and are cut where their own keys say so, as backup programs cut files: a picture
that is added, edited or taken out moves the borders near it and no others.

A shard's ``rows`` file lists its samples. It is the plan for whoever encodes the shard, and a part
of the dataset.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.config import DataConfig
from tinyflux.cache.key_set import KeySet
from tinyflux.cache.keys import Size, digest_of
from tinyflux.cache.manifest import FileInfo
from tinyflux.cache.rejected import Rejected
from tinyflux.cache.rows import IndexedPicture, Row
from tinyflux.cache.schema import GROUPS, ROWS, Column
from tinyflux.cache.shards import SHARD_FOLDER, write_group
from tinyflux.cache.sources import choose_size, size_problem
from tinyflux.cache.store import Store


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
    index: Iterable[Sequence[IndexedPicture]],
    rows_per_shard: int,
    rejected: Rejected,
) -> Iterator[PlannedShard]:
    """Cut the pictures of ``index`` into shards and write their rows files.

    The shards that are being filled, one split's pictures and 16 bytes of each sample are held. The
    cut depends on the samples alone.
    """
    open_shards: dict[Size, list[Row]] = {}
    for size, row in _samples(data, index, rejected):
        rows = open_shards.setdefault(size, [])
        rows.append(row)
        if _ends_shard(row.key, len(rows), rows_per_shard):
            yield _write_rows(store, size, open_shards.pop(size))
    for size, rows in open_shards.items():
        yield _write_rows(store, size, rows)


def _ends_shard(key: str, rows: int, most: int) -> bool:
    """A border on average every ``most / 2`` samples after the first quarter."""
    if rows < max(1, most // 4):
        return False
    return rows >= most or int(key[:12], 16) % max(1, most // 2) == 0


def _samples(
    data: DataConfig, index: Iterable[Sequence[IndexedPicture]], rejected: Rejected
) -> Iterator[tuple[Size, Row]]:
    known = KeySet()
    for pictures in index:
        found: list[tuple[Size, Row]] = []
        for picture in pictures:
            rejected.seen += 1
            width, height, source = picture.width, picture.height, picture.source
            reason = picture.reason or size_problem(width, height, data, source)
            if reason:
                rejected.rows.append((source, reason))
                continue
            size = choose_size(width, height, data)
            found += [(size, row) for row in picture.rows(size)]
        repeated = known.add([row.key for _, row in found])
        rejected.duplicates += sum(repeated)
        yield from (sample for sample, again in zip(found, repeated, strict=True) if not again)


def _write_rows(store: Store, size: Size, rows: list[Row]) -> PlannedShard:
    keys = [row.key for row in rows]
    columns: dict[str, Column] = {
        name: [getattr(row, name) for row in rows] for name in GROUPS[ROWS]
    }
    name = digest_of([list(size), keys])[:16]
    # Not the shard's name alone: a renamed file gives the same samples another list.
    listed = digest_of([vars(row) for row in rows])
    path = f"{SHARD_FOLDER}/{name}.{ROWS}.{listed[:8]}.parquet"
    file = write_group(store, path, keys, columns, trim_text=False)
    return PlannedShard(name, len(rows), size, file)


def read_rows(store: Store, rows_file: str) -> list[Row]:
    """The samples that a shard's ``rows`` file lists."""
    table = pq.read_table(pa.BufferReader(store.read(rows_file)))
    return [Row(**row) for row in table.to_pylist()]
