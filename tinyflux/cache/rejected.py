"""Samples that are not in the dataset: which, why, and how many may be."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.config import DataConfig
from tinyflux.cache.manifest import FileInfo, sha256
from tinyflux.cache.receipts import Receipt
from tinyflux.cache.store import Store
from tinyflux.errors import InputError

REJECTED_NAME = "rejected.parquet"


@dataclass
class Rejected:
    """Pictures that cannot be used, and samples that are listed twice.

    Attributes:
        rows: source and reason of each.
        seen: pictures looked at in all.
        duplicates: samples of the same picture, size and caption as an earlier one.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    seen: int = 0
    duplicates: int = 0


def unusable(data: DataConfig, receipts: Iterable[Receipt]) -> dict[int, str]:
    """Rows of a shard that are left out of the dataset, by number, with the reason."""
    found: dict[int, str] = {}
    for receipt in receipts:
        found.update(dict(receipt.rejected))
        if data.long_captions == "reject":
            found.update({row: _too_long(clip, t5) for row, clip, t5 in receipt.cut_rows})
    return found


def _too_long(clip: int, t5: int) -> str:
    return (
        f"its caption has {clip} tokens more than CLIP reads and {t5} more than T5 does "
        f"(model.max_text_length): shorten it, or set data.long_captions: cut"
    )


def check_rejected(data: DataConfig, count: int, rejected: Rejected, *reasons: str) -> None:
    """Refuse to go on when too many pictures are left out."""
    if count == rejected.seen or count > data.max_rejected * rejected.seen:
        reason = next(iter(reasons)) if reasons else rejected.rows[0][1]
        raise InputError(
            f"{count} of {rejected.seen} pictures in '{data.folder}' cannot be used, such as: "
            f"{reason} (data.max_rejected = {data.max_rejected:g} is the share that may be left "
            f"out)"
        )


def write_rejected(store: Store, rejected: Rejected) -> FileInfo | None:
    """The table of what is not in the dataset."""
    if not rejected.rows:
        return None
    sources, reasons = zip(*rejected.rows, strict=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"source": sources, "reason": reasons}), sink)
    data = memoryview(sink.getvalue())
    file = FileInfo(REJECTED_NAME, len(data), sha256(data))
    store.write(REJECTED_NAME, data)
    return file
