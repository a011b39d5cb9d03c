"""Parquet files with the pictures' bytes, as the Hugging Face Hub stores them."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.config import DataConfig
from tinyflux.cache.sources.filesystem import Place, files_of, open_place, unreadable
from tinyflux.cache.sources.raw import RawPicture, clean_captions, size_reason
from tinyflux.cache.sources.walk import Found
from tinyflux.errors import InputError


def parts(data: DataConfig, files: dict[str, Found]) -> Iterator[list[Any]]:
    """One row group each.

    Raises:
        InputError: a file that is not Parquet, lacks a column or has one of the wrong type, or a
            link that leads out of the folder.
    """
    place = open_place(data.folder, data.follow_links)
    for path, info in files_of(files, ".parquet"):
        try:
            with _open(place, path) as file:
                _check_columns(data, path, file.schema_arrow)
                groups = file.metadata.num_row_groups
        except OSError as error:
            raise unreadable(path, error) from error
        for group in range(groups):
            yield [path, info.size, info.version, group]


def _open(place: Place, path: str) -> pq.ParquetFile:
    place.check(path)
    try:
        return pq.ParquetFile(place.path(path), filesystem=place.system)
    except pa.ArrowException as error:
        raise InputError(f"'{path}' is not a whole Parquet file: {error!s:.200}") from error


def _check_columns(data: DataConfig, path: str, schema: pa.Schema) -> None:
    for name in filter(None, [data.image_key, data.caption_key, data.mask_key]):
        if name not in schema.names:
            raise InputError(
                f"'{path}' has no column '{name}' (it has {', '.join(schema.names)}): set "
                f"data.image_key, data.caption_key or data.mask_key"
            )
        kind = schema.field(name).type
        if name != data.caption_key and not _holds_bytes(kind):
            raise InputError(
                f"column '{name}' of '{path}' is of type {kind!s:.80}, not the bytes of pictures: "
                f"set data.image_key or data.mask_key"
            )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def read(data: DataConfig, part: list[Any]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.splits.read_split`.

    Raises:
        InputError: the row group is damaged.
    """
    path, _, _, group = part
    try:
        yield from _read_group(data, path, group)
    except OSError as error:
        raise unreadable(path, error) from error


def _read_group(data: DataConfig, path: str, group: int) -> Iterator[RawPicture]:
    reader = CellReader(data)
    texts = reader.column(path, group, data.caption_key)
    for row in range(len(texts)):
        source = f"{path}#{group}.{row}"
        captions, reason = clean_captions(texts[row].as_py(), f"of '{source}'")
        content = reader.cell(path, group, row, data.image_key)
        mask = reader.cell(path, group, row, data.mask_key) if data.mask_key else None
        if content is None:
            yield RawPicture(source, reason=f"the picture '{source}' is not in the file: no bytes")
            continue
        reason = reason or size_reason(source, max(len(content), len(mask or b"")))
        yield RawPicture(
            source=source,
            locator=json.dumps([path, group, row, data.image_key]),
            content=content,
            captions=captions,
            mask_locator="" if mask is None else json.dumps([path, group, row, data.mask_key]),
            mask=mask,
            reason=reason,
        )


class CellReader:
    """Pictures of Parquet files; keeps the columns of the row group that was read last."""

    def __init__(self, data: DataConfig):
        self._place = open_place(data.folder, data.follow_links)
        self._group: tuple[str, int] = ("", -1)
        self._columns: dict[str, pa.ChunkedArray] = {}

    def column(self, path: str, group: int, name: str) -> pa.ChunkedArray:
        """A column of a row group.

        Raises:
            InputError: it is damaged.
            OSError: the storage fails.
        """
        if self._group != (path, group):
            self._group, self._columns = (path, group), {}
        if name not in self._columns:
            with _open(self._place, path) as file:
                try:
                    self._columns[name] = file.read_row_group(group, columns=[name])[name]
                except pa.ArrowException as error:
                    raise InputError(
                        f"column '{name}' of row group {group} of '{path}' is damaged "
                        f"({error!s:.200}): copy the file here again"
                    ) from error
        return self._columns[name]

    def cell(self, path: str, group: int, row: int, name: str) -> bytes | None:
        """A picture's file, None where there is none; see :meth:`column` for errors."""
        return picture_bytes(self.column(path, group, name)[row])


def picture_bytes(cell: pa.Scalar) -> bytes | None:
    """A picture's file of a cell: ``binary``, or ``{bytes, path}`` as the Hub has it."""
    if isinstance(cell, pa.StructScalar) and cell.is_valid:
        cell = cell["bytes"]
    found: bytes | None = cell.as_py()
    return found
