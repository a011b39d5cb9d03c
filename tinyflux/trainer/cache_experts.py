"""The API's door to the in-memory caches; they live in :mod:`tinyflux.cache.memory`."""

from tinyflux.cache.memory import (
    DatasetCache,
    EncodingCache,
    LuneFeatureCache,
    MultiSourceCache,
    SolFeatureCache,
)

__all__ = [
    "DatasetCache",
    "EncodingCache",
    "LuneFeatureCache",
    "MultiSourceCache",
    "SolFeatureCache",
]
