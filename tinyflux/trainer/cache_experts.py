"""The API's door to the in-memory caches; they live in :mod:`tinyflux.cache.memory`."""

from tinyflux.cache.memory.dataset import DatasetCache
from tinyflux.cache.memory.encodings import EncodingCache
from tinyflux.cache.memory.multi_source import MultiSourceCache
from tinyflux.cache.memory.teachers import LuneFeatureCache, SolFeatureCache

__all__ = [
    "DatasetCache",
    "EncodingCache",
    "LuneFeatureCache",
    "MultiSourceCache",
    "SolFeatureCache",
]
