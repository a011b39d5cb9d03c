"""Whether a dataset is what its manifest says, byte by byte; and what to remove where it is not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tinyflux.cache.fingerprints import FINGERPRINTS_NAME
from tinyflux.cache.key_set import KeySet
from tinyflux.cache.manifest import FileInfo, Manifest, ShardInfo, sha256
from tinyflux.cache.receipts import RECEIPT_FOLDER
from tinyflux.cache.schema import DTYPE_FIELD, KEY, SHAPE_FIELD
from tinyflux.cache.shards import ShardReader, finite_rows
from tinyflux.cache.store import Store


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file of a dataset; ``file`` is relative to it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(store: Store, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong: files, checksums, row counts, keys, shapes, numbers.

    One file is in memory at a time.

    Args:
        progress: called with the number of shards that are done and of all.

    Raises:
        CacheError: there is no manifest that can be read.
    """
    manifest = Manifest.load(store)
    found: list[Problem] = []
    seen = KeySet()
    for number, shard in enumerate(manifest.shards, start=1):
        keys: list[str] | None = None
        for group, file in shard.files.items():
            problem = _file_problem(store, file)
            if problem is None:
                try:
                    keys, problem = _shard_problem(store, shard, group, file, keys)
                except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                    problem = f"cannot be read as Parquet ({error!s:.100})"
            if problem is not None:
                found.append(Problem(file.path, problem))
        if manifest.built and keys:
            there, dropped = seen.add(keys), set(shard.dropped)
            twice = [key for row, key in enumerate(keys) if there[row] and row not in dropped]
            if twice:
                what = f"key {twice[0]} is in the dataset twice"
                found.append(Problem(f"shard {shard.name}", what))
        if progress is not None:
            progress(number, len(manifest.shards))
    for other in filter(None, (manifest.null_text, manifest.rejected)):
        if problem := _file_problem(store, other):
            found.append(Problem(other.path, problem))
    return found


def _file_problem(store: Store, file: FileInfo) -> str | None:
    if (size := store.size(file.path)) is None:
        return "is missing"
    if size != file.bytes:
        return f"has {size} bytes, not {file.bytes}"
    if sha256(store.read(file.path)) != file.sha256:
        return "its checksum differs"
    return None


def _shard_problem(
    store: Store, shard: ShardInfo, group: str, file: FileInfo, keys: list[str] | None
) -> tuple[list[str] | None, str | None]:
    """The keys of the shard, and what is wrong with this file of it."""
    table = pq.read_table(*store.local([file]))
    own = table[KEY].to_pylist()
    keys = own if keys is None else keys
    if table.num_rows != shard.rows:
        return keys, f"has {table.num_rows} rows, the manifest says {shard.rows}"
    if own != keys:
        return keys, "its rows are others than, or in another order than, in the shard's first file"
    reader, kept = ShardReader(store), np.delete(np.arange(shard.rows), shard.dropped)
    for name, layout in file.columns.items():
        field = table.schema.field(name)
        if layout.shape:
            told = field.metadata or {}
            wanted = {SHAPE_FIELD: str(list(layout.shape)), DTYPE_FIELD: layout.dtype}
            if any(told.get(key) != value.encode() for key, value in wanted.items()):
                return keys, f"column '{name}' has another shape or dtype than the manifest says"
            rows = reader.tensor(shard, group, name, np.arange(shard.rows))
            raw = table[name].to_pylist()
            whole = rows.flatten(1).view(torch.uint8).numpy()
            if any(row[: len(b)].tobytes() != b for row, b in zip(whole, raw, strict=True)):
                return keys, f"column '{name}' is not where the manifest says"
            if not finite_rows(rows[torch.from_numpy(kept)]).all():
                return keys, f"column '{name}' holds numbers that are not finite"
    return keys, None


def drop(store: Store, problems: list[Problem]) -> list[str]:
    """Remove damaged files and their receipts, so that a build makes them again.

    Returns:
        What was removed, by path in ``store``.
    """
    removed = []
    for problem in problems:
        victims = [problem.file]
        if problem.file.endswith(".parquet"):
            victims.append(_receipt_of(problem.file))
        if problem.file.endswith(".safetensors"):
            victims.append(FINGERPRINTS_NAME)  # names the file as there
        for victim in victims:
            if store.size(victim) is not None:
                store.delete(victim)
                removed.append(victim)
    return removed


def unlisted(store: Store) -> Iterator[tuple[str, int]]:
    """Files that are no part of the dataset, and their sizes: of earlier models and pictures.

    Raises:
        CacheError: there is no manifest that can be read.
    """
    manifest = Manifest.load(store)
    listed = {file.path for file in manifest.files} | set(manifest.index)
    receipts = {_receipt_of(path) for path in listed}
    for name, size in sorted(store.list().items()):
        folder = name.split("/", 1)[0]
        ours = folder in ("shards", "receipts", "index") or name.startswith("null_text.")
        if ours and name not in listed | receipts:
            yield name, size


def _receipt_of(path: str) -> str:
    """The receipt of a shard's file."""
    return f"{RECEIPT_FOLDER}/{PurePosixPath(path).stem}.json"
