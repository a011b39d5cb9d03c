"""What pictures a source holds: each read once, checked, and written down by its content.

A source is cut into units. A unit's index is a small Parquet file, named by the unit's digest,
which follows the sizes and times of its files: a unit that has not changed is not read again.
"""

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.config import DataConfig
from tinyflux.cache.keys import digest_of
from tinyflux.cache.sources import RawPicture, SourceSplit, decode_mask, decode_picture, read_split
from tinyflux.cache.store import Store
from tinyflux.errors import InputError
from tinyflux.util.config import to_dict

INDEX_FOLDER = "index"
SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # where the picture is, for people
        ("locator", pa.string()),  # and for open_pictures
        ("mask_locator", pa.string()),  # empty: no mask
        ("captions", pa.list_(pa.string())),
        ("picture", pa.string()),  # digests of the files' bytes
        ("mask_picture", pa.string()),
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        ("reason", pa.string()),  # empty: nothing is wrong with it
    ]
)
# Settings that say what to do with a picture once it has been read.
_LATER = (
    "folder", "height", "width", "resize", "areas", "step", "max_aspect", "max_rejected",
    "long_captions",
    "follow_links",  # a unit's own digest says which links are followed
)  # fmt: skip


def index_path(data: DataConfig, unit: SourceSplit) -> str:
    """Where a unit's index belongs, relative to the dataset."""
    reading = {name: value for name, value in to_dict(data).items() if name not in _LATER}
    return f"{INDEX_FOLDER}/{digest_of([unit.digest, reading])}.parquet"


def write_index(store: Store, data: DataConfig, unit: SourceSplit) -> None:
    """Read every picture of ``unit`` and write its index."""
    rows = [_entry(data, raw) for raw in read_split(data, unit)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
    store.write(index_path(data, unit), memoryview(sink.getvalue()))


def read_index(store: Store, data: DataConfig, unit: SourceSplit) -> pa.Table:
    """What :func:`write_index` wrote."""
    return pq.read_table(pa.BufferReader(store.read(index_path(data, unit))))


def _entry(data: DataConfig, raw: RawPicture) -> dict[str, object]:
    entry: dict[str, object] = {
        "source": raw.source,
        "locator": raw.locator,
        "mask_locator": raw.mask_locator,
        "captions": list(raw.captions),
        "picture": "",
        "mask_picture": "",
        "width": 0,
        "height": 0,
        "reason": raw.reason,
    }
    if raw.reason:
        return entry
    try:
        # In full: what is broken must be known before hours are spent on the rest.
        image = decode_picture(raw.content, raw.source, data.max_pixels)
        if raw.mask is not None:
            decode_mask(raw.mask, raw.source, image.size, data.max_pixels)
            entry["mask_picture"] = digest_of(raw.mask)
    except InputError as error:
        return {**entry, "reason": str(error)}
    entry["picture"] = digest_of(raw.content)
    entry["width"], entry["height"] = image.size
    return entry
