"""A source is a list of units, each read in order by one task."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyarrow import fs

from tinyflux.cache.keys import digest_of
from tinyflux.cache.sources import folder, parquet, webdataset
from tinyflux.cache.sources.config import DataConfig
from tinyflux.cache.sources.filesystem import list_files, open_location, path_below
from tinyflux.cache.sources.raw import MAX_FILE_BYTES, RawPicture
from tinyflux.errors import InputError


@dataclass(frozen=True)
class Unit:
    """Some pictures of a source: a few hundred files, a tar, or a row group.

    Attributes:
        kind: format of the source.
        part: JSON; what is in the unit, with the sizes and times of its files.
    """

    kind: str
    part: str

    @property
    def digest(self) -> str:
        """Changes when a file of the unit does."""
        return digest_of([self.kind, self.part])


class _Format(NamedTuple):
    suffixes: tuple[str, ...]
    parts: Callable[[DataConfig, dict[str, fs.FileInfo]], Iterable[Any]]
    read: Callable[[DataConfig, Any], Iterator[RawPicture]]


_FORMATS = {
    "folder": _Format(folder.SUFFIXES, folder.parts, folder.read),
    "webdataset": _Format((".tar",), webdataset.parts, webdataset.read),
    "parquet": _Format((".parquet",), parquet.parts, parquet.read),
}


def list_units(data: DataConfig) -> list[Unit]:
    """What there is, in a fixed order. Pictures are not opened.

    Raises:
        InputError: nothing there, several formats at once, or a metadata file that is wrong.
    """
    files = list_files(data.folder)
    kind = data.format
    if kind == "auto":
        found = [
            name
            for name, form in _FORMATS.items()
            if any(path.lower().endswith(form.suffixes) for path in files)
        ]
        if len(found) > 1:
            raise InputError(
                f"'{data.folder}' holds {' and '.join(found)} data: set data.format to one of them"
            )
        kind = found[0] if found else "folder"
    units = [Unit(kind, json.dumps(part)) for part in _FORMATS[kind].parts(data, files)]
    if not units:
        suffixes = ", ".join(_FORMATS[kind].suffixes)
        raise InputError(f"'{data.folder}' holds no pictures: there are no {suffixes} files")
    return units


def read_unit(data: DataConfig, unit: Unit) -> Iterator[RawPicture]:
    """Every picture of a unit, in order. What is wrong with one is told by its ``reason``."""
    return _FORMATS[unit.kind].read(data, json.loads(unit.part))


def open_pictures(data: DataConfig, locators: Sequence[str]) -> Iterator[bytes | Exception]:
    """The files that ``RawPicture`` names, in order; for each that cannot be read, why.

    Neighbours are read at once where the format asks for it.
    """
    system, root = open_location(data.folder)
    reader = parquet.CellReader(data)
    for locator in locators:
        try:
            place = json.loads(locator)
            if len(place) == 4:  # file, row group, row, column
                yield reader.read(*place)
                continue
            with system.open_input_file(path_below(system, root, place[0])) as file:
                if len(place) == 3:  # tar, offset, size
                    file.seek(place[1])
                yield file.read(place[2] if len(place) == 3 else MAX_FILE_BYTES)
        except (OSError, InputError, ValueError, KeyError, IndexError) as error:
            yield InputError(f"a picture cannot be read again ({locator}): {error!s:.200}")
