"""A folder of picture files with captions beside them or in metadata files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from tinyflux.cache.config import DataConfig
from tinyflux.cache.keys import digest_of
from tinyflux.cache.sources.filesystem import Place, leads_out, open_place, unreadable
from tinyflux.cache.sources.raw import RawPicture, clean_captions, size_reason, text_captions
from tinyflux.cache.sources.walk import Found
from tinyflux.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PICTURES_PER_UNIT = 512
_METADATA = ("metadata.jsonl", "metadata.csv")


def parts(data: DataConfig, files: dict[str, Found]) -> Iterator[list[dict[str, Any]]]:
    """Neighbouring pictures, each with the files that belong to it and their sizes and versions.

    Where one of these leads out of the folder, ``outside`` names it; a link to another folder
    stands for the pictures in that.
    """
    described = _read_metadata(data, files)
    masks = {about["mask"] for about in described.values() if "mask" in about}
    beside = f".{data.mask_key}.png" if data.mask_key else ""

    def stamp(path: str) -> list[Any]:
        info = files[path]
        return [path, info.size, info.version]

    part: list[dict[str, Any]] = []
    for path in files:
        folder = files[path].directory
        if not folder and (not path.lower().endswith(SUFFIXES) or path in masks):
            continue
        if beside and path.endswith(beside):
            continue
        stem = path.rpartition(".")[0]
        entry: dict[str, Any] = {"picture": stamp(path)}
        about = described.get(path, {})
        if "text" in about:
            entry["captions"] = about["text"]
        elif f"{stem}.txt" in files:
            entry["caption_file"] = stamp(f"{stem}.txt")
        mask = about.get("mask", f"{stem}{beside}")
        if beside and mask in files:
            entry["mask"] = stamp(mask)
        own = [entry[name][0] for name in ("picture", "caption_file", "mask") if name in entry]
        if outside := [name for name in own if files[name].outside]:
            entry["outside"] = outside[0]
        part.append(entry)
        if _ends_unit(path, len(part)):
            yield part
            part = []
    if part:
        yield part


def _ends_unit(path: str, pictures: int) -> bool:
    """Cut where a name says so, not after so many: a new picture changes few units but its own."""
    if pictures < PICTURES_PER_UNIT // 4:
        return False
    if pictures >= PICTURES_PER_UNIT:
        return True
    return int(digest_of(path.encode())[:8], 16) % (PICTURES_PER_UNIT // 2) == 0


def read(data: DataConfig, part: list[dict[str, Any]]) -> Iterator[RawPicture]:
    """See :func:`tinyflux.cache.sources.splits.read_split`."""
    place = open_place(data.folder, data.follow_links)
    for entry in part:
        try:
            yield _read_entry(data, place, entry)
        except FileNotFoundError as error:
            path = entry["picture"][0]
            yield RawPicture(path, reason=f"'{path}' went away while it was read: {error!s:.200}")
        except OSError as error:
            raise unreadable(entry["picture"][0], error) from error


def _read_entry(data: DataConfig, place: Place, entry: dict[str, Any]) -> RawPicture:
    path, size, _ = entry["picture"]
    if "outside" in entry:
        return RawPicture(path, reason=leads_out(entry["outside"]))
    mask_path, mask_size, _ = entry.get("mask", ("", 0, 0))
    reason = size_reason(path, size) or size_reason(mask_path, mask_size)
    if reason:
        return RawPicture(path, reason=reason)
    captions, reason = _captions(data, place, entry)
    return RawPicture(
        source=path,
        locator=json.dumps([path]),
        content=load(place, path),
        captions=captions,
        mask_locator=json.dumps([mask_path]) if mask_path else "",
        mask=load(place, mask_path) if mask_path else None,
        reason=reason,
    )


def load(place: Place, path: str) -> bytes:
    """The whole of a file."""
    with place.open(path) as file:
        content: bytes = file.read()
    return content


def _captions(data: DataConfig, place: Place, entry: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    path = entry["picture"][0]
    if "captions" in entry:
        return clean_captions(entry["captions"], f"of '{path}'")
    if "caption_file" not in entry:
        return (), f"picture '{path}' has no caption: put a .txt file of the same name beside it"
    beside, size, _ = entry["caption_file"]
    if reason := size_reason(beside, size):
        return (), reason
    return text_captions(load(place, beside), f"'{beside}'", data.caption_lines)


def _read_metadata(data: DataConfig, files: dict[str, Found]) -> dict[str, dict[str, Any]]:
    """``text`` and ``mask`` by picture, of every metadata file."""
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        if not path.endswith(_METADATA) or PurePosixPath(path).name not in _METADATA:
            continue
        folder = PurePosixPath(path).parent
        for line, entry in _entries(data, path):
            where = f"'{path}' line {line}"
            name = entry.get("file_name")
            if not isinstance(name, str) or data.caption_key not in entry:
                raise InputError(
                    f"{where} has no file_name and {data.caption_key}: name the caption's column "
                    f"with data.caption_key"
                )
            about = {"text": entry[data.caption_key]}
            named = {"picture": name}
            if data.mask_key and entry.get(data.mask_key):
                named["mask"] = str(entry[data.mask_key])
                about["mask"] = str(folder / named["mask"])
            for named_file in named.values():
                if str(folder / named_file) not in files:
                    raise InputError(f"{where} lists '{named_file}', which does not exist")
            found[str(folder / name)] = about
    return found


def _entries(data: DataConfig, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and contents of a metadata file."""
    try:
        text = load(open_place(data.folder, data.follow_links), path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return _json_lines(path, text) if path.endswith(".jsonl") else _csv_lines(path, text)


def _json_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines, which also splits at characters that JSON allows within strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{path}' line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InputError(f"'{path}' line {number} is not a JSON object")
        yield number, entry


def _csv_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(f"'{path}' line {rows.line_num} is not CSV: {error}") from error
