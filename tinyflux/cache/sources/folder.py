"""A folder of picture files with captions beside them or in metadata files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs

from tinyflux.cache.sources.config import DataConfig
from tinyflux.cache.sources.filesystem import open_location, path_below
from tinyflux.cache.sources.raw import MAX_FILE_BYTES, RawPicture, clean_captions
from tinyflux.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PICTURES_PER_UNIT = 512
_METADATA = ("metadata.jsonl", "metadata.csv")


def parts(data: DataConfig, files: dict[str, fs.FileInfo]) -> Iterator[list[dict[str, Any]]]:
    """Neighbouring pictures, each with the files that belong to it and their sizes and times."""
    described = _read_metadata(data, files)

    def stamp(path: str) -> list[Any]:
        return [path, files[path].size, files[path].mtime_ns or 0]

    part = []
    for path in files:
        stem = str(PurePosixPath(path).with_suffix(""))
        masks = PurePosixPath(stem).suffix == f".{data.mask_key}" if data.mask_key else False
        if masks or not path.lower().endswith(SUFFIXES):
            continue
        entry: dict[str, Any] = {"picture": stamp(path)}
        about = described.get(path, {})
        if "text" in about:
            entry["captions"] = about["text"]
        elif f"{stem}.txt" in files:
            entry["caption_file"] = stamp(f"{stem}.txt")
        mask = about.get("mask") or f"{stem}.{data.mask_key}.png"
        if data.mask_key and mask in files:
            entry["mask"] = stamp(mask)
        part.append(entry)
        if len(part) == PICTURES_PER_UNIT:
            yield part
            part = []
    if part:
        yield part


def read(data: DataConfig, part: list[dict[str, Any]]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.units.read_unit`."""
    system, root = open_location(data.folder)

    def load(path: str) -> bytes:
        with system.open_input_stream(path_below(system, root, path)) as stream:
            return stream.read(MAX_FILE_BYTES)

    for entry in part:
        path = entry["picture"][0]
        try:
            captions, reason = _captions(data, entry, load)
            mask = load(entry["mask"][0]) if "mask" in entry else None
            yield RawPicture(
                source=path,
                locator=json.dumps([path]),
                content=load(path),
                captions=captions,
                mask_locator=json.dumps([entry["mask"][0]]) if mask is not None else "",
                mask=mask,
                reason=reason,
            )
        except OSError as error:
            yield RawPicture(path, reason=f"picture '{path}' cannot be read: {error!s:.200}")


def _captions(data: DataConfig, entry: dict[str, Any], load: Any) -> tuple[tuple[str, ...], str]:
    path = entry["picture"][0]
    where = path
    if "captions" in entry:
        texts = entry["captions"]
    elif "caption_file" in entry:
        where = entry["caption_file"][0]
        try:
            text = load(where).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return (), f"the caption '{where}' is not UTF-8 text: {error}"
        texts = text.splitlines() if data.caption_lines else text
    else:
        return (), f"picture '{path}' has no caption: put a .txt file of the same name beside it"
    captions = clean_captions(texts)
    if not captions:
        return (), f"the caption '{where}' is empty: write one, or take the picture out"
    return captions, ""


def _read_metadata(data: DataConfig, files: dict[str, fs.FileInfo]) -> dict[str, dict[str, Any]]:
    """``text`` and ``mask`` by picture, of every metadata file."""
    system, root = open_location(data.folder)
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        place = PurePosixPath(path)
        if place.name not in _METADATA:
            continue
        with system.open_input_stream(path_below(system, root, path)) as stream:
            text = _decode(path, stream.read())
        entries = _json_lines(path, text) if place.suffix == ".jsonl" else _csv_lines(text)
        for number, entry in entries:
            where = f"'{path}' line {number}"
            name = entry.get("file_name")
            if not isinstance(name, str) or data.caption_key not in entry:
                raise InputError(
                    f"{where} has no file_name and {data.caption_key}: name the caption's column "
                    f"with data.caption_key"
                )
            picture = str(place.parent / name)
            if picture not in files:
                raise InputError(f"{where} lists '{name}', which does not exist")
            about = {"text": entry[data.caption_key]}
            if data.mask_key and entry.get(data.mask_key):
                about["mask"] = str(place.parent / str(entry[data.mask_key]))
            found[picture] = about
    return found


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error}") from error


def _json_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"'{path}' line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InputError(f"'{path}' line {number} is not a JSON object")
        yield number, entry


def _csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(csv.DictReader(io.StringIO(text)), start=2)
