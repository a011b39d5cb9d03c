"""Columns of tensors in memory, and the same columns as a dataset directory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyflux.cache.config import MAX_ROWS_PER_SHARD
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.manifest import MANIFEST_NAME, Manifest, Recipe, ShardInfo
from tinyflux.cache.shards import require_finite, write_null_text, write_shard
from tinyflux.cache.store import open_store
from tinyflux.errors import CacheError, InputError
from tinyflux.model.text import NullText


def save_columns(
    path: str, columns: dict[str, Tensor], recipe: Recipe, null_text: NullText | None, name: str
) -> None:
    """Write ``columns`` as a dataset directory, replacing what is there only when whole."""
    store = open_store(path)
    if store.size(MANIFEST_NAME) is not None:
        raise CacheError(f"there is a cache at '{path}' already: use another path or delete it")
    count = len(next(iter(columns.values())))
    shards: list[ShardInfo] = []
    for start in range(0, count, MAX_ROWS_PER_SHARD):
        part = {n: rows[start : start + MAX_ROWS_PER_SHARD] for n, rows in columns.items()}
        keys = [f"{row:08d}" for row in range(start, min(count, start + MAX_ROWS_PER_SHARD))]
        require_finite(part)
        shards.append(write_shard(store, f"{len(shards):05d}", keys, part, trim_text=True))
    written = None
    if null_text is not None:
        written = write_null_text(store, null_text[0], null_text[1])
    Manifest(count, recipe, tuple(shards), written, name=name).save(store)


def load_columns(path: str, columns: Sequence[str]) -> tuple[dict[str, Tensor], CachedDataset]:
    """The named columns of all rows, in their stored dtype."""
    dataset = CachedDataset(path)
    for name in columns:
        if dataset.manifest.layout(name) is None:
            raise CacheError(f"the cache '{path}' holds no {name}")
    rows = dataset.read(range(len(dataset)))
    layouts = {name: dataset.manifest.layout(name) for name in columns}
    dtypes = {name: getattr(torch, layout.dtype) for name, layout in layouts.items() if layout}
    return {name: rows[name].to(dtypes[name]) for name in columns}, dataset


def check_lengths(**columns: Tensor) -> None:
    """Refuse columns that are empty, or of several lengths, with an :class:`InputError`."""
    lengths = {name: len(rows) for name, rows in columns.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputError(
            f"a cache's tensors must have one length above 0, not {lengths}: one row per sample"
        )
