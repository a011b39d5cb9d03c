"""Rows that were computed before and stand in files of other shards."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.keys import Size, content_keys
from tinyflux.cache.manifest import ShardInfo
from tinyflux.cache.receipts import Receipt, all_receipts
from tinyflux.cache.schema import KEY, ROWS
from tinyflux.cache.shards import SHARD_FOLDER
from tinyflux.cache.store import Store

CONTENT_COLUMNS = (KEY, "picture", "mask_picture", "caption")


@dataclass
class Reused:
    """Rows of a group that need not be computed.

    Attributes:
        shards: files to take them from.
        rows: (row of the new shard, place in ``shards``, row there).
    """

    shards: list[ShardInfo] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)


class ReusableRows:
    """What files of shards that are no longer planned hold, by content.

    Args:
        fingerprints: ``GroupInfo.fingerprint`` of each wanted group; files with others are of no
            use.
        planned: names of the shards that the dataset will have.
    """

    def __init__(self, store: Store, fingerprints: Mapping[str, str], planned: Collection[str]):
        self._store = store
        self._lists: dict[str, str] | None = None
        self._shards: dict[str, list[ShardInfo]] = {}
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        for receipt in all_receipts(store, passed_over=planned):
            if fingerprints.get(receipt.group) == receipt.fingerprint and receipt.file is not None:
                self._add(receipt)

    def _rows_file(self, shard: str) -> str | None:
        """A list of the shard's samples; any will do: they differ in where the pictures lie."""
        if self._lists is None:
            paths = sorted(self._store.list(SHARD_FOLDER), reverse=True)
            self._lists = {
                path.removeprefix(f"{SHARD_FOLDER}/").split(".")[0]: path
                for path in paths
                if f".{ROWS}." in path
            }
        return self._lists.get(shard)

    def _add(self, receipt: Receipt) -> None:
        rows_file = self._rows_file(receipt.shard)
        if rows_file is None or receipt.file is None:
            return
        shards = self._shards.setdefault(receipt.group, [])
        places = self._places.setdefault(receipt.group, {})
        contents = read_contents(self._store, rows_file, receipt.group, receipt.size)
        rejected = dict(receipt.rejected)
        for row, content in enumerate(contents):
            if row not in rejected:
                places.setdefault(content, (len(shards), row))
        shards.append(ShardInfo(receipt.shard, receipt.rows, {receipt.group: receipt.file}))

    def find(self, group: str, rows_file: str, size: Size) -> Reused:
        """Those rows of a shard, listed in ``rows_file``, that are known."""
        places, found = self._places.get(group, {}), Reused()
        if not places:
            return found  # as in every first build, which need not read its lists for it
        contents = read_contents(self._store, rows_file, group, size)
        numbers: dict[int, int] = {}
        for row, content in enumerate(contents):
            if content in places:
                shard, there = places[content]
                if shard not in numbers:
                    numbers[shard] = len(found.shards)
                    found.shards.append(self._shards[group][shard])
                found.rows.append((row, numbers[shard], there))
        return found


def read_contents(store: Store, rows_file: str, group: str, size: Size) -> list[str]:
    """:func:`content_keys` of a shard whose samples ``rows_file`` lists."""
    table = pq.read_table(pa.BufferReader(store.read(rows_file)), columns=list(CONTENT_COLUMNS))
    return content_keys(group, {name: table[name].to_pylist() for name in CONTENT_COLUMNS}, size)


def batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """``rows`` in pieces of at most ``size``."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
