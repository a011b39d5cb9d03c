"""What pictures a source holds: each read once, checked, and written down by its content.

A source is cut into units. A unit's index is a small Parquet file, named by the unit's digest,
which follows the sizes and times of its files: a unit that has not changed is not read again.
"""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.config import DataConfig
from tinyflux.cache.keys import digest_of
from tinyflux.cache.rows import INDEX_SCHEMA, IndexedPicture
from tinyflux.cache.sources import RawPicture, SourceSplit, decode_mask, decode_picture, read_split
from tinyflux.cache.store import Store
from tinyflux.errors import InputError
from tinyflux.util.config import to_dict

INDEX_FOLDER = "index"
# Settings that say what to do with a picture once it has been read.
_LATER = (
    "folder", "height", "width", "resize", "areas", "step", "max_aspect", "max_rejected",
    "long_captions", "variants",
    "follow_links",  # a unit's own digest says which links are followed
)  # fmt: skip


def index_path(data: DataConfig, unit: SourceSplit) -> str:
    """Where a unit's index belongs, relative to the dataset."""
    reading = {name: value for name, value in to_dict(data).items() if name not in _LATER}
    return f"{INDEX_FOLDER}/{digest_of([unit.digest, reading])}.parquet"


def write_index(store: Store, data: DataConfig, unit: SourceSplit) -> None:
    """Read every picture of ``unit`` and write its index."""
    pictures = [vars(_look_at(data, raw)) for raw in read_split(data, unit)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(pictures, INDEX_SCHEMA), sink, compression="zstd")
    store.write(index_path(data, unit), memoryview(sink.getvalue()))


def read_index(store: Store, data: DataConfig, unit: SourceSplit) -> list[IndexedPicture]:
    """What :func:`write_index` wrote."""
    table = pq.read_table(pa.BufferReader(store.read(index_path(data, unit))))
    return [IndexedPicture(**picture) for picture in table.to_pylist()]


def _look_at(data: DataConfig, raw: RawPicture) -> IndexedPicture:
    """Decode a picture in full: what is broken must be known before hours are spent on the rest."""
    found = IndexedPicture(
        raw.source, raw.locator, raw.mask_locator, list(raw.captions), reason=raw.reason
    )
    if raw.reason:
        return found
    try:
        image = decode_picture(raw.content, raw.source, data.max_pixels)
        if raw.mask is not None:
            decode_mask(raw.mask, raw.source, image.size, data.max_pixels)
    except InputError as error:
        return replace(found, reason=str(error))
    width, height = image.size
    return replace(
        found,
        picture=digest_of(raw.content),
        mask_picture="" if raw.mask is None else digest_of(raw.mask),
        width=width,
        height=height,
    )
