"""Receipts: what an actor says of each file that it has written whole.

The files of a shard are named by their samples and by what made them, so a receipt answers the only
question of a build that continues: is this very thing there already?
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from tinyflux.cache.keys import Size
from tinyflux.cache.manifest import FileInfo
from tinyflux.cache.shards import SHARD_FOLDER, is_whole
from tinyflux.cache.store import Store
from tinyflux.errors import ConfigError
from tinyflux.util.config import from_dict, to_dict

RECEIPT_FOLDER = "receipts"
# What receipts on disk call an attribute otherwise.
FILE_KEYS = {"fingerprint": "maker"}
ATTRIBUTES = {key: name for name, key in FILE_KEYS.items()}


@dataclass(frozen=True, slots=True)
class Receipt:
    """A column group of a shard.

    Attributes:
        shard, group, fingerprint: whose samples, which columns, and ``GroupInfo.fingerprint``.
        rows: in the file.
        size: width and height of the encoded pictures.
        file: None where no row of the shard could be made.
        rejected: rows that are zeros in the file, by number, with the reason.
        computed: rows that were run through models; the rest was taken from other files.
        cut: :attr:`cut_rows` as ``row:clip:t5 row:clip:t5 ...``, since a build job holds all of
            its receipts and every caption may be long. None in those of a version that rejected
            such rows.
        seconds: that it took.
    """

    shard: str
    group: str
    fingerprint: str
    rows: int
    size: Size
    file: FileInfo | None
    rejected: list[tuple[int, str]] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0
    cut: str | None = None

    @property
    def cut_rows(self) -> list[tuple[int, int, int]]:
        """Rows whose captions are longer than the text encoders read, by number.

        With each, how many of its tokens CLIP and T5 do not read; the text group's receipt knows.
        """
        numbers = [map(int, cut.split(":")) for cut in (self.cut or "").split()]
        return [(row, clip, t5) for row, clip, t5 in numbers]

    @property
    def outdated(self) -> bool:
        """Whether rows may have been rejected for captions that would be cut now."""
        return self.cut is None and bool(self.rejected)

    def save(self, store: Store) -> None:
        """Commit the file: from here on it counts."""
        path = receipt_path(self.shard, self.group, self.fingerprint)
        record = {FILE_KEYS.get(name, name): value for name, value in to_dict(self).items()}
        store.write(path, json.dumps(record).encode())


def receipt_path(shard: str, group: str, fingerprint: str) -> str:
    """Where a receipt belongs, relative to the dataset."""
    return f"{RECEIPT_FOLDER}/{shard}.{group}.{fingerprint[:8]}.json"


def group_path(shard: str, group: str, fingerprint: str) -> str:
    """Where the file of a receipt belongs, relative to the dataset."""
    return f"{SHARD_FOLDER}/{shard}.{group}.{fingerprint[:8]}.parquet"


def read_receipt(store: Store, shard: str, group: str, fingerprint: str) -> Receipt | None:
    """The receipt of a file that is there with its full size and need not be made again."""
    receipt = _read(store, receipt_path(shard, group, fingerprint))
    if receipt is None or receipt.fingerprint != fingerprint or receipt.outdated:
        return None
    return receipt


def all_receipts(store: Store, passed_over: Collection[str] = ()) -> Iterator[Receipt]:
    """Every valid receipt, by name; those of shards ``passed_over`` are not even read."""
    for path in sorted(store.list(RECEIPT_FOLDER)):
        shard = path.removeprefix(f"{RECEIPT_FOLDER}/").split(".", 1)[0]
        if not path.endswith(".json") or shard in passed_over:
            continue
        if (receipt := _read(store, path)) is not None:
            yield receipt


def _read(store: Store, path: str) -> Receipt | None:
    try:
        record = json.loads(store.read(path))
        named = {ATTRIBUTES.get(key, key): value for key, value in record.items()}
        receipt = from_dict(Receipt, named, path)
    except (OSError, ValueError, TypeError, AttributeError, ConfigError):
        return None
    return receipt if receipt.file is None or is_whole(store, receipt.file) else None
