"""The records of a dataset's lists: a picture that was indexed, and a row.

Their fields, in order, are the columns of the Parquet files, here and nowhere else.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from tinyflux.cache.keys import Size, sample_key

_KINDS: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int32(),
    list[str]: pa.list_(pa.string()),
}


@dataclass(frozen=True)
class IndexedPicture:
    """A picture of a source, as its split's index knows it.

    Attributes:
        source: where the picture is, for people.
        locator: where it is, for ``open_pictures``.
        mask_locator: where its mask is; empty without one.
        captions: each makes a row.
        picture: digest of the file's bytes.
        mask_picture: digest of the mask file's bytes; empty without one.
        width: of the picture when it stands upright.
        height: of the picture when it stands upright.
        reason: why it cannot be used; empty where nothing is wrong with it.
    """

    source: str
    locator: str
    mask_locator: str
    captions: list[str] = field(default_factory=list)
    picture: str = ""
    mask_picture: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""

    def rows(self, size: Size) -> Iterator["Row"]:
        """One row for each caption, of the picture at the encoded ``size``."""
        for caption in self.captions:
            yield Row(
                key=sample_key(self.picture, size, caption),
                picture=self.picture,
                mask_picture=self.mask_picture,
                caption=caption,
                source=self.source,
                locator=self.locator,
                mask_locator=self.mask_locator,
                width=self.width,
                height=self.height,
            )


@dataclass(frozen=True)
class Row:
    """One sample: a picture with one of its captions.

    Attributes:
        key: the sample's identity (:func:`tinyflux.cache.keys.sample_key`).

    The other fields are :class:`IndexedPicture`'s.
    """

    key: str
    picture: str
    mask_picture: str
    caption: str
    source: str
    locator: str
    mask_locator: str
    width: int
    height: int


INDEX_SCHEMA = pa.schema([(f.name, _KINDS[f.type]) for f in dataclasses.fields(IndexedPicture)])
