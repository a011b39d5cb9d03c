"""Parquet files with the pictures' bytes, as the Hugging Face Hub stores them."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tinyflux.cache.sources.config import DataConfig
from tinyflux.cache.sources.filesystem import open_location, path_below
from tinyflux.cache.sources.raw import RawPicture, clean_captions
from tinyflux.errors import InputError


def parts(data: DataConfig, files: dict[str, fs.FileInfo]) -> Iterator[list[Any]]:
    """One row group each.

    Raises:
        InputError: a file that is not Parquet or lacks a column.
    """
    system, root = open_location(data.folder)
    wanted = [data.image_key, data.caption_key, *filter(None, [data.mask_key])]
    for path, info in files.items():
        if not path.lower().endswith(".parquet"):
            continue
        try:
            with pq.ParquetFile(path_below(system, root, path), filesystem=system) as file:
                names, groups = file.schema_arrow.names, file.metadata.num_row_groups
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"'{path}' is not a whole Parquet file: {error!s:.200}") from error
        for name in wanted:
            if name not in names:
                raise InputError(
                    f"'{path}' has no column '{name}' (it has {', '.join(names)}): set "
                    f"data.image_key, data.caption_key or data.mask_key"
                )
        for group in range(groups):
            yield [path, info.size, info.mtime_ns or 0, group]


def read(data: DataConfig, part: list[Any]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.units.read_unit`."""
    path, _, _, group = part
    reader = CellReader(data)
    try:
        texts = reader.column(path, group, data.caption_key).to_pylist()
    except (OSError, InputError, pa.ArrowException) as error:
        yield RawPicture(path, reason=f"'{path}' cannot be read: {error!s:.200}")
        return
    for row, text in enumerate(texts):
        source = f"{path}#{group}.{row}"
        captions = clean_captions(text)
        try:
            content = reader.read(path, group, row, data.image_key)
            mask = None
            if data.mask_key and reader.column(path, group, data.mask_key)[row].is_valid:
                mask = reader.read(path, group, row, data.mask_key)
        except (OSError, InputError, pa.ArrowException) as error:
            yield RawPicture(source, reason=f"picture '{source}' cannot be read: {error!s:.200}")
            continue
        yield RawPicture(
            source=source,
            locator=json.dumps([path, group, row, data.image_key]),
            content=content,
            captions=captions,
            mask_locator="" if mask is None else json.dumps([path, group, row, data.mask_key]),
            mask=mask,
            reason="" if captions else f"the caption of '{source}' is empty",
        )


class CellReader:
    """Pictures of Parquet files; keeps the columns of the row group that was read last."""

    def __init__(self, data: DataConfig):
        self._data = data
        self._place: tuple[str, int] = ("", -1)
        self._columns: dict[str, pa.ChunkedArray] = {}

    def column(self, path: str, group: int, name: str) -> pa.ChunkedArray:
        """A column of a row group."""
        if self._place != (path, group):
            self._place, self._columns = (path, group), {}
        if name not in self._columns:
            system, root = open_location(self._data.folder)
            with pq.ParquetFile(path_below(system, root, path), filesystem=system) as file:
                self._columns[name] = file.read_row_group(group, columns=[name])[name]
        return self._columns[name]

    def read(self, path: str, group: int, row: int, name: str) -> bytes:
        """A picture file: ``binary``, or ``{bytes, path}`` as the Hub has it.

        Raises:
            InputError: it is not in the file.
        """
        value = self.column(path, group, name)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InputError(f"column '{name}' does not hold the picture's bytes")
        return content
