"""Where captioned pictures come from: folders, WebDataset tars, Parquet; local or at a URL."""

from tinyflux.cache.sources.pictures import decode_mask, decode_picture, fit_mask, fit_picture
from tinyflux.cache.sources.sizes import choose_size, size_buckets, size_problem
from tinyflux.cache.sources.units import RawPicture, Unit, list_units, open_pictures, read_unit

__all__ = [
    "RawPicture",
    "Unit",
    "choose_size",
    "decode_mask",
    "decode_picture",
    "fit_mask",
    "fit_picture",
    "list_units",
    "open_pictures",
    "read_unit",
    "size_buckets",
    "size_problem",
]
