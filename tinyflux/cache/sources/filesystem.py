"""Opening paths and URLs."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec.implementations.local import LocalFileSystem
from pyarrow import NativeFile, fs

from tinyflux.cache.sources.walk import Found, is_below, walk
from tinyflux.errors import ConfigError, InputError
from tinyflux.storage.hub import content_digests
from tinyflux.storage.remote import open_filesystem

_WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Place:
    """A folder, or some files of one.

    Attributes:
        root: of the folder, in ``system``.
        pattern: which files, below ``root``; empty: all that are not hidden.
        bounds: the real path of a folder of this machine that nothing is read from outside of;
            None: there is none, as at a URL.
    """

    system: fs.FileSystem
    root: str
    pattern: str = ""
    bounds: str | None = None

    def files(self) -> dict[str, Found]:
        """Every file by its path below ``root``, sorted, and links that lead out of bounds.

        Raises:
            InputError: the folder cannot be listed.
        """
        try:
            if isinstance(self.system, fs.LocalFileSystem):
                below = walk(self.root, self.bounds, self._enters)
            else:
                below = self._listed()
            return {path: found for path, found in sorted(below) if self._includes(path, found)}
        except (UnicodeEncodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"'{self.root}' holds a file whose name is not UTF-8 text ({error.object!r:.200}): "
                f"rename it"
            ) from error
        except OSError as error:
            raise InputError(f"'{self.root}' cannot be listed: {error!s:.200}") from error

    def _listed(self) -> Iterator[tuple[str, Found]]:
        digests = content_digests(self.system, self.root)
        for info in self.system.get_file_info(fs.FileSelector(self.root, recursive=True)):
            if info.is_file:
                path = info.path[len(self.root) :].lstrip("/")
                version = digests.get(info.path, info.mtime_ns or 0)
                yield path, Found(info.size, version)

    def _includes(self, path: str, found: Found) -> bool:
        if found.directory:
            return self._enters(path)
        if not self.pattern:
            return not _hidden(path)
        names, patterns = path.split("/"), self.pattern.split("/")
        return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

    def _enters(self, path: str) -> bool:
        """Whether files below the folder ``path`` may be meant."""
        if not self.pattern:
            return not _hidden(path)
        names, patterns = path.split("/"), self.pattern.split("/")
        return len(names) < len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

    def path(self, relative: str) -> str:
        """In ``system``."""
        return f"{self.root.rstrip('/')}/{relative}"

    def open(self, relative: str) -> NativeFile:
        """A file for reading at any position.

        Raises:
            InputError: as :meth:`check`.
        """
        self.check(relative)
        return self.system.open_input_file(self.path(relative))

    def check(self, relative: str) -> None:
        """Refuse what leads out of bounds now, whatever it was when it was listed; InputError."""
        if self.bounds is not None:
            real = os.path.realpath(self.path(relative))
            if not is_below(real, self.bounds):
                raise InputError(leads_out(relative))


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def files_of(files: dict[str, Found], suffix: str) -> Iterator[tuple[str, Found]]:
    """Files of a format whose every file counts.

    Raises:
        InputError: such a file, or a folder that may hold some, is a link that leads out.
    """
    for path, found in files.items():
        if found.directory or path.lower().endswith(suffix):
            if found.outside:
                raise InputError(leads_out(path))
            yield path, found


def leads_out(path: str) -> str:
    """Why a link is refused."""
    return (
        f"'{path}' is a link that leads out of data.folder: put a copy in its place, or set "
        f"data.follow_links: true if you trust every link in that folder"
    )


def open_place(location: str, follow_links: bool = False) -> Place:
    """A local path, or a URL that pyarrow or fsspec opens: a folder, a file, or ``folder/*.tar``.

    Args:
        follow_links: wherever they lead; else only to what is really in the folder.

    Raises:
        ConfigError: none was given.
        InputError: there is nothing, or it cannot be reached.
    """
    if not location:
        raise ConfigError("data.folder is not set: name a folder of pictures with captions")
    folder, pattern = location, ""
    wildcard = _WILDCARD.search(location)
    if wildcard and not os.path.exists(location):  # a name may hold brackets
        cut = location.rfind("/", 0, wildcard.start()) + 1
        folder, pattern = location[:cut] or ".", location[cut:]
    try:
        system, path = open_filesystem(folder)
        if _is_local(system):
            system = fs.LocalFileSystem()
        kind = system.get_file_info(path).type
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"data.folder '{location}' cannot be opened: {error!s:.200}") from error
    if kind == fs.FileType.NotFound:
        raise InputError(f"data.folder '{location}' does not exist: check the path")
    bounded = isinstance(system, fs.LocalFileSystem) and not follow_links
    bounds = os.path.realpath(path) if bounded else None
    if kind == fs.FileType.File:
        return Place(system, os.path.dirname(path), glob.escape(os.path.basename(path)), bounds)
    return Place(system, path, pattern, bounds)


def _is_local(system: fs.FileSystem) -> bool:
    """Whether this is fsspec's way to this machine's files."""
    handler = system.handler if isinstance(system, fs.PyFileSystem) else None
    return isinstance(handler, fs.FSSpecHandler) and isinstance(handler.fs, LocalFileSystem)


def unreadable(path: str, error: Exception) -> InputError:
    """What to raise when the storage, not the file, is at fault.

    It must end the unit: as the ``reason`` of a picture it would be remembered for good, and a
    network's bad minute would cost pictures.
    """
    return InputError(
        f"'{path}' cannot be read now ({error!s:.200}): see that its storage can be reached and "
        f"that you may read it, then run the same command again"
    )
