"""WebDataset tars: members of the same name up to the first dot are one sample."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from tinyflux.cache.sources.config import DataConfig
from tinyflux.cache.sources.filesystem import open_location, path_below
from tinyflux.cache.sources.folder import SUFFIXES
from tinyflux.cache.sources.raw import MAX_FILE_BYTES, RawPicture, clean_captions


def parts(data: DataConfig, files: dict[str, fs.FileInfo]) -> Iterator[list[Any]]:
    """One tar each."""
    for path, info in files.items():
        if path.lower().endswith(".tar"):
            yield [path, info.size, info.mtime_ns or 0]


def read(data: DataConfig, part: list[Any]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.units.read_unit`."""
    path = part[0]
    system, root = open_location(data.folder)
    try:
        with (
            system.open_input_file(path_below(system, root, path)) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            members = (member for member in tar if member.isfile())
            for name, group in groupby(members, key=lambda member: _split(member.name)[0]):
                yield _sample(data, tar, path, name, list(group))
    except (tarfile.TarError, OSError) as error:
        yield RawPicture(path, reason=f"'{path}' is not a whole, uncompressed tar: {error!s:.200}")


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
        return b"" if file is None else file.read(MAX_FILE_BYTES)

    def locate(member: tarfile.TarInfo) -> str:
        return json.dumps([path, member.offset_data, member.size])

    picture = next((members[s[1:]] for s in SUFFIXES if s[1:] in members), None)
    if picture is None:
        return RawPicture(source, reason=f"sample '{source}' has no picture")
    if picture.size > MAX_FILE_BYTES:
        return RawPicture(source, reason=f"picture '{source}' has {picture.size} bytes")
    try:
        if "txt" in members:
            text = load(members["txt"]).decode("utf-8-sig")
            texts: object = text.splitlines() if data.caption_lines else text
        elif "json" in members:
            texts = json.loads(load(members["json"])).get(data.caption_key, "")
        else:
            return RawPicture(source, reason=f"sample '{source}' has no .txt and no .json caption")
    except (ValueError, AttributeError) as error:
        return RawPicture(source, reason=f"the caption of '{source}' is not text: {error!s:.100}")
    captions = clean_captions(texts)
    mask = members.get(f"{data.mask_key}.png") if data.mask_key else None
    return RawPicture(
        source=source,
        locator=locate(picture),
        content=load(picture),
        captions=captions,
        mask_locator="" if mask is None else locate(mask),
        mask=None if mask is None else load(mask),
        reason="" if captions else f"the caption of '{source}' is empty",
    )
