"""Shards on disk: written whole or not at all, read by memory map.

Every column of a file is one uncompressed page, so a row's bytes lie at ``offset + row * width``,
and any row of any shard is read without decoding its neighbours. The writer checks that the page
is really where the manifest says.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tinyflux.cache.manifest import FileInfo, ShardInfo, sha256
from tinyflux.cache.schema import (
    GROUPS,
    KEY,
    MAX_COLUMN_BYTES,
    TOKENS,
    Column,
    Layout,
    columns_of,
    plain_column,
    tensor_column,
    token_counts,
    trimmed_column,
)
from tinyflux.cache.store import Store
from tinyflux.errors import CacheError
from tinyflux.util.config import dtype_name, parse_dtype

SHARD_FOLDER = "shards"
NULL_TEXT_NAME = "null_text.safetensors"


def write_shard(
    store: Store,
    name: str,
    keys: Sequence[str],
    columns: Mapping[str, Column],
    trim_text: bool,
) -> ShardInfo:
    """Write one file per column group that ``columns`` has.

    Args:
        store: the dataset; files go to its ``shards`` folder.
        keys: one per row.
        columns: by the names of ``schema.GROUPS``, each with one entry per row.
        trim_text: do not store zero vectors after a caption's last token.
    """
    files = {}
    for group in GROUPS:
        if chosen := columns_of(group, columns):
            path = f"{SHARD_FOLDER}/{name}.{group}.parquet"
            files[group] = write_group(store, path, keys, chosen, trim_text)
    return ShardInfo(name, len(keys), files)


def write_group(
    store: Store, path: str, keys: Sequence[str], columns: Mapping[str, Column], trim_text: bool
) -> FileInfo:
    """Write one file of a shard, unless these very bytes are there; see :func:`write_shard`.

    Args:
        path: in ``store``.
    """
    fields, arrays = [], []
    pages: dict[str, tuple[bytes, Layout]] = {}

    def add(field: pa.Field, array: pa.Array) -> None:
        fields.append(field)
        arrays.append(array)

    def add_tensor(name: str, rows: Tensor, trim: bool = False) -> None:
        if trim:
            counts = token_counts(rows)
            add_tensor(TOKENS, counts)
            field, array, page = trimmed_column(name, rows, counts)
        elif rows.ndim == 1:
            field, array = plain_column(name, rows.tolist())
            page = rows.numpy().tobytes()
        else:
            field, array, page = tensor_column(name, rows)
        add(field, array)
        layout = Layout(0, tuple(rows.shape[1:]), dtype_name(rows.dtype), trim)
        pages[name] = (page, layout)

    add(*plain_column(KEY, keys))
    for name, column in columns.items():
        if len(column) != len(keys):
            raise CacheError(f"column '{name}' has {len(column)} rows, the shard {len(keys)}")
        if isinstance(column, Tensor):
            add_tensor(name, column, trim=trim_text and name == "t5_embeds")
        else:
            add(*plain_column(name, column))
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(arrays, schema=pa.schema(fields)),
        sink,
        row_group_size=len(keys),
        data_page_size=MAX_COLUMN_BYTES,
        use_dictionary=False,
        write_statistics=False,
        compression="NONE",
    )
    data = sink.getvalue()
    file = FileInfo(path, data.size, sha256(memoryview(data)), _locate(path, data, pages))
    if not (is_whole(store, file) and sha256(store.read(path)) == file.sha256):
        store.write(path, memoryview(data))
    return file


def _locate(
    path: str, data: pa.Buffer, pages: Mapping[str, tuple[bytes, Layout]]
) -> dict[str, Layout]:
    """Find each tensor column's values in the finished file, and make sure of them."""
    row_group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    view, found = memoryview(data).cast("B"), {}
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        name = chunk.path_in_schema
        if name not in pages:
            continue
        page, layout = pages[name]
        offset = chunk.data_page_offset + chunk.total_compressed_size - len(page)
        if len(page) > MAX_COLUMN_BYTES or view[offset : offset + len(page)] != page:
            raise CacheError(
                f"column '{name}' of '{path}' does not fit one page ({len(page)} bytes): "
                f"use a smaller cache.rows_per_shard"
            )
        found[name] = Layout(offset, layout.shape, layout.dtype, layout.trimmed)
    return found


def write_null_text(
    store: Store, t5_embeds: Tensor, clip_pooled: Tensor, path: str = NULL_TEXT_NAME
) -> FileInfo:
    """Write the empty caption's embedding: ``[L, D]`` and ``[P]``."""
    tensors = {
        "t5_embeds": t5_embeds.cpu().contiguous(),
        "clip_pooled": clip_pooled.cpu().contiguous(),
    }
    data = save_safetensors(tensors)
    store.write(path, data)
    return FileInfo(path, len(data), sha256(data))


def read_null_text(store: Store, file: FileInfo) -> tuple[Tensor, Tensor]:
    """What :func:`write_null_text` wrote, as fp32."""
    tensors = load_safetensors(store.read(file.path))
    return tensors["t5_embeds"].float(), tensors["clip_pooled"].float()


def is_whole(store: Store, file: FileInfo) -> bool:
    """Whether the file is there with its full size (its checksum is not looked at)."""
    return store.size(file.path) == file.bytes


class ShardReader:
    """Reads rows of a dataset's shards; keeps the last ``max_open`` files mapped."""

    def __init__(self, store: Store, max_open: int = 512) -> None:
        self._store = store
        self._max_open = max_open
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()

    def strings(self, shard: ShardInfo, group: str, column: str) -> list[str]:
        """A text column of a whole shard."""
        (path,) = self._store.local([shard.files[group]])
        table = pq.read_table(path, columns=[column], memory_map=True)
        texts: list[str] = table[column].to_pylist()
        return texts

    def tensor(self, shard: ShardInfo, group: str, column: str, rows: np.ndarray) -> Tensor:
        """Rows (positions in the shard) of a tensor column, ``[B, ...]`` in the stored dtype."""
        layout = shard.files[group].columns[column]
        found = torch.empty(len(rows), *layout.shape, dtype=parse_dtype(layout.dtype))
        self.read_into(found, np.arange(len(rows)), shard, group, column, rows)
        return found

    def read_into(
        self,
        target: Tensor,
        places: np.ndarray,
        shard: ShardInfo,
        group: str,
        column: str,
        rows: np.ndarray,
    ) -> None:
        """Put rows ``[n]`` (positions in the shard) at ``places`` ``[n]`` of ``target``.

        Each row is copied once, from the page cache to its place.

        Args:
            target: contiguous, in the stored dtype.
        """
        file = shard.files[group]
        self.open([file])
        layout, data = file.columns[column], self._maps[file.path]
        if target.dtype != parse_dtype(layout.dtype):
            raise CacheError(
                f"'{file.path}' holds {column} as {layout.dtype}, another shard as "
                f"{dtype_name(target.dtype)}: build the cache again"
            )
        width = int(np.prod(layout.shape)) * target.dtype.itemsize
        raw = target.flatten(1).view(torch.uint8).numpy()
        begins, sizes = layout.offset + rows * width, np.full(len(rows), width)
        if layout.trimmed:
            start = file.columns[TOKENS].offset
            tokens = data[start : start + 4 * shard.rows].view("<i4").astype(np.int64)
            stored = tokens * (width // layout.shape[0])
            ends = np.cumsum(stored + 4)
            begins, sizes = layout.offset + ends[rows] - stored[rows], stored[rows]
        for place, begin, size in zip(places, begins, sizes, strict=True):
            raw[place, :size] = data[begin : begin + size]
            raw[place, size:] = 0

    def open(self, files: Sequence[FileInfo]) -> None:
        """Map files that will be read; those at a URL are fetched side by side."""
        missing = []
        for file in files:
            if file.path in self._maps:
                self._maps.move_to_end(file.path)
            else:
                missing.append(file)
        if not missing:
            return
        for file, path in zip(missing, self._store.local(missing), strict=True):
            # As a plain array: cutting rows out of a memmap costs several times as much.
            self._maps[file.path] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        while len(self._maps) > max(self._max_open, len(files)):
            self._maps.popitem(last=False)


def finite_rows(rows: Tensor) -> Tensor:
    """Which of ``[N, ...]`` hold only finite numbers, ``[N]`` bool."""
    return torch.isfinite(rows).flatten(1).all(dim=1)


def require_finite(columns: Mapping[str, Tensor]) -> None:
    """Refuse columns that a model overflowed in.

    Raises:
        CacheError: names the column.
    """
    for name, rows in columns.items():
        if not finite_rows(rows).all():
            raise CacheError(
                f"{name} holds numbers that are not finite in {dtype_name(rows.dtype)}: check the "
                f"model that made it, or its dtype"
            )
