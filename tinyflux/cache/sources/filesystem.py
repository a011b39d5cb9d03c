"""Opening paths and URLs."""

import fnmatch
import glob
import os
import re
from dataclasses import dataclass

from pyarrow import NativeFile, fs

from tinyflux.errors import ConfigError, InputError
from tinyflux.storage.remote import open_filesystem

_WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Place:
    """A folder, or some files of one.

    Attributes:
        root: of the folder, in ``system``.
        pattern: which files, below ``root``; empty: all that are not hidden.
    """

    system: fs.FileSystem
    root: str
    pattern: str = ""

    def files(self) -> dict[str, fs.FileInfo]:
        """Every file by its path below ``root``, sorted.

        Raises:
            InputError: the folder cannot be listed.
        """
        try:
            infos = self.system.get_file_info(fs.FileSelector(self.root, recursive=True))
            below = {info.path[len(self.root) :].lstrip("/"): info for info in infos}
        except UnicodeDecodeError as error:
            raise InputError(
                f"'{self.root}' holds a file whose name is not UTF-8 text ({error.object!r:.200}): "
                f"rename it"
            ) from error
        except OSError as error:
            raise InputError(f"'{self.root}' cannot be listed: {error!s:.200}") from error
        return {
            path: info
            for path, info in sorted(below.items())
            if info.is_file and self._includes(path)
        }

    def _includes(self, path: str) -> bool:
        if not self.pattern:
            return not (path.startswith(".") or "/." in path)
        names, patterns = path.split("/"), self.pattern.split("/")
        return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))

    def path(self, relative: str) -> str:
        """In ``system``."""
        return f"{self.root.rstrip('/')}/{relative}"

    def open(self, relative: str) -> NativeFile:
        """A file for reading at any position."""
        return self.system.open_input_file(self.path(relative))


def open_place(location: str) -> Place:
    """A local path, or a URL that pyarrow or fsspec opens: a folder, a file, or ``folder/*.tar``.

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
        kind = system.get_file_info(path).type
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"data.folder '{location}' cannot be opened: {error!s:.200}") from error
    if kind == fs.FileType.NotFound:
        raise InputError(f"data.folder '{location}' does not exist: check the path")
    if kind == fs.FileType.File:
        return Place(system, os.path.dirname(path), glob.escape(os.path.basename(path)))
    return Place(system, path, pattern)


def unreadable(path: str, error: Exception) -> InputError:
    """What to raise when the storage, not the file, is at fault.

    It must end the unit: as the ``reason`` of a picture it would be remembered for good, and a
    network's bad minute would cost pictures.
    """
    return InputError(
        f"'{path}' cannot be read now ({error!s:.200}): see that its storage can be reached and "
        f"that you may read it, then run the same command again"
    )
