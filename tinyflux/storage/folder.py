"""A folder on a disk or at a URL: whole files by relative path, and nothing half-written."""

import os
import stat
from pathlib import Path
from typing import Protocol

from tinyflux.util.files import atomic_write


class Folder(Protocol):
    """Files by path relative to the folder, with ``/`` between names.

    Attributes:
        location: as a user wrote it.
        name: its last part.
    """

    location: str
    name: str

    def read(self, path: str) -> bytes:
        """A file's bytes; FileNotFoundError where there is none."""
        ...

    def write(self, path: str, data: bytes | memoryview) -> None:
        """Put a file there, or replace it; whole or not at all."""
        ...

    def size(self, path: str) -> int | None:
        """A file's bytes, None where there is none."""
        ...

    def list(self, folder: str = "") -> dict[str, int]:
        """Every file below ``folder`` with its size, by path."""
        ...

    def names(self) -> set[str]:
        """What lies in it directly, folders too."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file that may be there."""
        ...


class LocalFolder:
    """A directory, which need not exist yet."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.location, self.name = str(directory), self.directory.name

    def read(self, path: str) -> bytes:
        """See :meth:`Folder.read`."""
        return (self.directory / path).read_bytes()

    def write(self, path: str, data: bytes | memoryview) -> None:
        """See :meth:`Folder.write`."""
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, data)

    def size(self, path: str) -> int | None:
        """See :meth:`Folder.size`."""
        try:
            found = os.stat(f"{self.directory}/{path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, folder: str = "") -> dict[str, int]:
        """See :meth:`Folder.list`."""
        found: dict[str, int] = {}
        for directory, _, names in os.walk(self.directory / folder):
            below = os.path.relpath(directory, self.directory)
            for name in names:
                path = name if below == "." else f"{below}/{name}"
                if (size := self.size(path)) is not None:
                    found[path] = size
        return found

    def names(self) -> set[str]:
        """See :meth:`Folder.names`."""
        return set(os.listdir(self.directory)) if self.directory.exists() else set()

    def delete(self, path: str) -> None:
        """See :meth:`Folder.delete`."""
        (self.directory / path).unlink(missing_ok=True)
