"""Opening paths and URLs."""

import os

import fsspec
from pyarrow import ArrowInvalid, fs

from tinyflux.errors import ConfigError, InputError


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """File system, and the path in it, of a local path or a URL that pyarrow or fsspec opens.

    Raises:
        ConfigError: none was given.
        InputError: there is nothing, or it cannot be reached.
    """
    if not location:
        raise ConfigError("data.folder is not set: name a folder of pictures with captions")
    try:
        system, path = _resolve(location)
        kind = system.get_file_info(path).type
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"data.folder '{location}' cannot be opened: {error!s:.200}") from error
    if kind == fs.FileType.NotFound:
        raise InputError(f"data.folder '{location}' does not exist: check the path")
    return system, path


def _resolve(location: str) -> tuple[fs.FileSystem, str]:
    if "://" not in location:
        return fs.LocalFileSystem(), os.path.abspath(location)
    try:
        return fs.FileSystem.from_uri(location)
    except ArrowInvalid:  # not one of pyarrow's own
        system, path = fsspec.core.url_to_fs(location)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def list_files(location: str) -> dict[str, fs.FileInfo]:
    """Every file that is not hidden, by its path below ``location``, sorted.

    A single file is listed under its own name.
    """
    system, root = open_location(location)
    if system.get_file_info(root).is_file:
        return {os.path.basename(root): system.get_file_info(root)}
    found = {}
    for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
        relative = info.path[len(root) :].lstrip("/")
        if info.is_file and not any(part.startswith(".") for part in relative.split("/")):
            found[relative] = info
    return dict(sorted(found.items()))


def path_below(system: fs.FileSystem, root: str, relative: str) -> str:
    """The inverse of :func:`list_files`' naming."""
    return root if system.get_file_info(root).is_file else f"{root.rstrip('/')}/{relative}"
