"""A source is a list of units, each read in order by one task."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinyflux.cache.config import DataConfig
from tinyflux.cache.keys import digest_of
from tinyflux.cache.sources import folder, parquet, webdataset
from tinyflux.cache.sources.filesystem import open_place, unreadable
from tinyflux.cache.sources.raw import RawPicture
from tinyflux.cache.sources.walk import Found
from tinyflux.errors import InputError


@dataclass(frozen=True)
class SourceSplit:
    """Some pictures of a source: a few hundred files, a tar, or a row group.

    Attributes:
        kind: format of the source.
        part: JSON; what is in the unit, with the sizes and versions of its files.
    """

    kind: str
    part: str

    @property
    def digest(self) -> str:
        """Changes when a file of the unit does."""
        return digest_of([self.kind, self.part])


class _Format(NamedTuple):
    suffixes: tuple[str, ...]
    parts: Callable[[DataConfig, dict[str, Found]], Iterable[Any]]
    read: Callable[[DataConfig, Any], Iterator[RawPicture]]


_FORMATS = {
    "folder": _Format(folder.SUFFIXES, folder.parts, folder.read),
    "webdataset": _Format((".tar",), webdataset.parts, webdataset.read),
    "parquet": _Format((".parquet",), parquet.parts, parquet.read),
}


def list_splits(data: DataConfig) -> list[SourceSplit]:
    """What there is, in a fixed order. Pictures are not opened.

    Raises:
        InputError: nothing there, several formats at once, or a metadata file that is wrong.
    """
    files = open_place(data.folder, data.follow_links).files()
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
    units = [SourceSplit(kind, json.dumps(part)) for part in _FORMATS[kind].parts(data, files)]
    if not units:
        suffixes = ", ".join(_FORMATS[kind].suffixes)
        raise InputError(f"'{data.folder}' holds no pictures: there are no {suffixes} files")
    return units


def read_split(data: DataConfig, unit: SourceSplit) -> Iterator[RawPicture]:
    """Every picture of a unit, in order. What is wrong with one is told by its ``reason``.

    Raises:
        InputError: the storage fails, or a tar or row group is damaged as a whole.
    """
    return _FORMATS[unit.kind].read(data, json.loads(unit.part))


def open_pictures(data: DataConfig, locators: Sequence[str]) -> Iterator[bytes | Exception]:
    """The files that ``RawPicture`` names, in order; for each that is not there, why.

    A tar stays open and a row group in memory for as long as neighbours come from it.

    Raises:
        InputError: the storage fails.
    """
    place = open_place(data.folder, data.follow_links)
    cells = parquet.CellReader(data)
    with webdataset.MemberReader(place) as members:
        for locator in locators:
            found = json.loads(locator)
            try:
                if len(found) == 4:  # file, row group, row, column
                    content = cells.cell(*found)
                elif len(found) == 3:  # tar, offset, size
                    content = members.member(*found)
                else:
                    content = folder.load(place, *found)
                yield InputError(f"{_again(locator)}: it is empty") if content is None else content
            except (FileNotFoundError, InputError, KeyError, IndexError) as error:
                yield InputError(f"{_again(locator)}: {error!s:.200}")
            except OSError as error:
                raise unreadable(found[0], error) from error


def _again(locator: str) -> str:
    return f"the picture at {locator} cannot be read again"
