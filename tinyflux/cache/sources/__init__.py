"""Where captioned pictures come from: folders, WebDataset tars, Parquet; local or at a URL."""

from tinyflux.cache.sources.pictures import decode_mask, decode_picture, fit_mask, fit_picture
from tinyflux.cache.sources.raw import RawPicture
from tinyflux.cache.sources.sizes import choose_size, size_buckets, size_problem
from tinyflux.cache.sources.splits import (
    SourceSplit,
    list_splits,
    open_pictures,
    read_split,
)

__all__ = [
    "RawPicture",
    "SourceSplit",
    "choose_size",
    "decode_mask",
    "decode_picture",
    "fit_mask",
    "fit_picture",
    "list_splits",
    "open_pictures",
    "read_split",
    "size_buckets",
    "size_problem",
]
