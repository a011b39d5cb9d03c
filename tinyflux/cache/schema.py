"""THE columns of a dataset, and how a tensor becomes a Parquet column and comes back.

A tensor column holds each row's raw little-endian bytes as ``fixed_size_binary``; the field's
metadata says shape and dtype. A text column that drops padding is ``large_binary`` (each row as
many bytes as its tokens need) beside the row's token count. Columns are never null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tinyflux.cache.keys import base_of
from tinyflux.cache.rows import Row
from tinyflux.util.config import dtype_name

FORMAT_VERSION = 2

# Column groups, each a file of its own per shard, so that one can be remade without the others.
# ``rows`` says what the samples are; the others hold what models made of them.
ROWS = "rows"
KEY = "key"  # in every file: what row-aligns the groups
GROUPS: dict[str, tuple[str, ...]] = {
    ROWS: tuple(field.name for field in fields(Row) if field.name != KEY),
    "latents": ("latents",),
    "mask": ("mask",),
    "text": ("t5_embeds", "clip_pooled"),
    "lune": ("lune",),
    "sol": ("sol_stats", "sol_spatial"),
}
# What is made of a picture's pixels, and so again of each of its variants.
PIXEL_GROUPS = ("latents", "mask", "lune", "sol")
TOKENS = "t5_length"  # beside a text column that drops padding

SHAPE_FIELD, DTYPE_FIELD = b"tinyflux.shape", b"tinyflux.dtype"

MAX_COLUMN_BYTES = 2**31 - 2**16

Column = Tensor | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor column's raw values lie in its file.

    Attributes:
        offset: byte at which the column's only page starts its values.
        shape: shape of one row, without padding dropped.
        dtype: torch dtype's name.
        trimmed: each row is preceded by its byte count (uint32) and holds only as many leading
            entries of axis 0 as the ``t5_length`` column says.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    trimmed: bool = False


def tensor_bytes(rows: Tensor) -> np.ndarray:
    """``[N, ...]`` tensor as ``[N, bytes per row]`` uint8."""
    flat = rows.detach().cpu().contiguous().reshape(rows.shape[0], -1)
    return flat.view(torch.uint8).numpy()


def token_counts(embeds: Tensor) -> Tensor:
    """How many leading positions of ``[N, L, D]`` hold anything but zeros, ``[N]`` int32."""
    used = (embeds != 0).any(dim=-1)
    positions = torch.arange(1, embeds.shape[1] + 1, device=embeds.device)
    return (used * positions).amax(dim=1).to(torch.int32)


def _field(name: str, kind: pa.DataType, shape: Sequence[int], dtype: torch.dtype) -> pa.Field:
    metadata = {
        SHAPE_FIELD: str(list(shape)).encode(),
        DTYPE_FIELD: dtype_name(dtype).encode(),
    }
    return pa.field(name, kind, nullable=False, metadata=metadata)


def tensor_column(name: str, rows: Tensor) -> tuple[pa.Field, pa.Array, bytes]:
    """The field, the array, and the bytes that its page must hold."""
    raw = tensor_bytes(rows)
    kind = pa.binary(raw.shape[1])
    array = pa.FixedSizeBinaryArray.from_buffers(kind, len(raw), [None, pa.py_buffer(raw)])
    return _field(name, kind, rows.shape[1:], rows.dtype), array, raw.tobytes()


def trimmed_column(name: str, rows: Tensor, counts: Tensor) -> tuple[pa.Field, pa.Array, bytes]:
    """As :func:`tensor_column`, for ``[N, L, D]`` of which row i keeps ``counts[i]`` positions."""
    raw = tensor_bytes(rows)
    per_token = raw.shape[1] // rows.shape[1]
    cut = [row[: int(n) * per_token].tobytes() for row, n in zip(raw, counts, strict=True)]
    page = b"".join(len(item).to_bytes(4, "little") + item for item in cut)
    kind = pa.large_binary()
    return _field(name, kind, rows.shape[1:], rows.dtype), pa.array(cut, kind), page


def plain_column(name: str, values: Sequence[str] | Sequence[int]) -> tuple[pa.Field, pa.Array]:
    """A column of strings or of whole numbers."""
    kind = pa.string() if isinstance(values[0], str) else pa.int32()
    return pa.field(name, kind, nullable=False), pa.array(values, kind)


def column_names(group: str) -> tuple[str, ...]:
    """The columns that ``group`` may have, those of another variant named as the plain one's."""
    return GROUPS[base_of(group)]


def columns_of(group: str, columns: Mapping[str, Column]) -> dict[str, Column]:
    """Those of ``columns`` that ``group`` holds, in the schema's order; empty if it has none."""
    return {name: columns[name] for name in GROUPS[group] if name in columns}
