"""WebDataset tars: members of the same name up to the first dot are one sample."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Any

from tinyflux.cache.config import DataConfig
from tinyflux.cache.sources.filesystem import Place, files_of, open_place, unreadable
from tinyflux.cache.sources.folder import SUFFIXES
from tinyflux.cache.sources.raw import RawPicture, clean_captions, size_reason, text_captions
from tinyflux.cache.sources.walk import Found
from tinyflux.errors import InputError

_BUFFER_BYTES = 2**20


def parts(data: DataConfig, files: dict[str, Found]) -> Iterator[list[Any]]:
    """One tar each.

    Raises:
        InputError: a link that leads out of the folder.
    """
    for path, info in files_of(files, ".tar"):
        yield [path, info.size, info.version]


def read(data: DataConfig, part: list[Any]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.splits.read_split`.

    Raises:
        InputError: the tar is damaged; how many pictures are lost in it cannot be known.
    """
    path = part[0]
    try:
        with (
            _open_buffered(open_place(data.folder, data.follow_links), path) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            members = (member for member in tar if _wanted(member))
            for name, group in groupby(members, key=lambda member: _split(member.name)[0]):
                yield _sample(data, tar, path, name, list(group))
            # tarfile takes a damaged header for the end.
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"no member begins at byte {tar.offset}")
    except tarfile.TarError as error:
        raise InputError(
            f"'{path}' is not a whole, uncompressed tar ({error!s:.200}): copy it here again"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _open_buffered(place: Place, path: str) -> IO[bytes]:
    """A file whose small neighbouring reads become few large ones, as remote storage needs."""
    return io.BufferedReader(place.open(path), _BUFFER_BYTES)


def _wanted(member: tarfile.TarInfo) -> bool:
    # A hidden file is not data, such as those that macOS puts beside each; and a sparse file's
    # bytes are not in one place.
    name = PurePosixPath(member.name).name
    return member.isfile() and not member.issparse() and not name.startswith(".")


def _split(name: str) -> tuple[str, str]:
    """A member's sample and suffix."""
    place = PurePosixPath(name)
    stem, _, suffix = place.name.partition(".")
    return str(place.parent / stem), suffix.lower()


def _sample(
    data: DataConfig, tar: tarfile.TarFile, path: str, name: str, group: list[tarfile.TarInfo]
) -> RawPicture:
    source = f"{path}/{name}"
    members = {_split(member.name)[1]: member for member in group}

    def load(member: tarfile.TarInfo) -> bytes:
        file = tar.extractfile(member)
        return b"" if file is None else file.read()

    def locate(member: tarfile.TarInfo) -> str:
        return json.dumps([path, member.offset_data, member.size])

    picture = next((members[s[1:]] for s in SUFFIXES if s[1:] in members), None)
    if picture is None:
        return RawPicture(source, reason=f"sample '{source}' has no picture")
    mask = members.get(f"{data.mask_key}.png") if data.mask_key else None
    caption = members.get("txt") or members.get("json")
    if caption is None:
        return RawPicture(source, reason=f"sample '{source}' has no .txt and no .json caption")
    for member in (picture, caption, mask):
        if member is not None and (reason := size_reason(f"{path}/{member.name}", member.size)):
            return RawPicture(source, reason=reason)
    if "txt" in members:
        captions, reason = text_captions(load(caption), f"of '{source}'", data.caption_lines)
    else:
        captions, reason = _json_captions(load(caption), source, data.caption_key)
    return RawPicture(
        source=source,
        locator=locate(picture),
        content=load(picture),
        captions=captions,
        mask_locator="" if mask is None else locate(mask),
        mask=None if mask is None else load(mask),
        reason=reason,
    )


def _json_captions(content: bytes, source: str, key: str) -> tuple[tuple[str, ...], str]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return (), f"the .json of '{source}' is not JSON: {error!s:.100}"
    if not isinstance(found, dict) or key not in found:
        return (), f"the .json of '{source}' has no '{key}': name the key with data.caption_key"
    return clean_captions(found[key], f"of '{source}'")


class MemberReader:
    """Members of tars; keeps open the tar that was read last."""

    def __init__(self, place: Place):
        self._place = place
        self._path = ""
        self._file: IO[bytes] = io.BytesIO()

    def __enter__(self) -> "MemberReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def member(self, path: str, offset: int, size: int) -> bytes:
        """The bytes of a tar where a member was found."""
        if path != self._path:
            self._file.close()
            self._path = ""  # should this open fail, the next must not find a closed file
            self._file = _open_buffered(self._place, path)
            self._path = path
        self._file.seek(offset)
        return self._file.read(size)
