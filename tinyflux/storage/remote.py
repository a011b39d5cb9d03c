"""Folders at URLs: S3, GCS, Azure and HDFS by pyarrow's own clients, others by fsspec's.

A connection that is lost is tried again for about a minute. Then, and at once where trying again
cannot help, one sentence says what could not be reached.
"""

import contextlib
import errno
import logging
import posixpath
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
from pyarrow import ArrowInvalid, fs

from tinyflux.errors import ConfigError, StorageError
from tinyflux.storage.folder import Folder, LocalFolder
from tinyflux.storage.hub import is_hub, open_hub
from tinyflux.util.urls import check_url, is_url

TRIES, FIRST_PAUSE = 5, 1.0  # each pause is twice the one before; S3's client tries, too
PIECE = 16 * 2**20
# Stores in which an upload appears when it is complete; elsewhere a rename makes it so.
_OBJECT_STORES = ("s3", "gcs", "abfs")
_FINAL = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "' not found", "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
)  # fmt: skip

logger = logging.getLogger(__name__)
T = TypeVar("T")


def open_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        ConfigError: the URL holds a password, which would be kept with the run's config.
        OSError, ValueError, ImportError: there is no client for it.
    """
    if not is_url(location):
        return fs.LocalFileSystem(), str(Path(location).absolute())
    check_url(location)
    if is_hub(location):
        return open_hub(location)
    try:
        own: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(location)
        return own
    except ArrowInvalid:  # not one of pyarrow's own
        system, path = fsspec.core.url_to_fs(location)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def open_folder(location: str) -> Folder:
    """The folder at a path or URL; it need not be there yet."""
    return RemoteFolder(location) if is_url(location) else LocalFolder(location)


class RemoteFolder:
    """A folder at a URL.

    Raises:
        ConfigError: nothing can open such a URL.
        StorageError: from every method: what cannot be reached, or must not be.
    """

    def __init__(self, location: str):
        self.location = location
        check_url(location)
        try:  # some clients ask their storage where it is
            opened = self._try("open it", lambda: open_filesystem(location))
        except (FileNotFoundError, ValueError, ImportError) as error:
            raise ConfigError(f"'{location}' cannot be opened: {error!s:.200}") from error
        self.filesystem, self.root = opened[0], opened[1].rstrip("/")
        self.name = posixpath.basename(self.root)

    def read(self, path: str) -> bytes:
        """See :meth:`Folder.read`."""

        def get() -> bytes:
            with self.filesystem.open_input_file(self._full(path)) as file:
                content: bytes = file.read()
            return content

        return self._try(f"read {path}", get)

    def write(self, path: str, data: bytes | memoryview | pa.Buffer) -> None:
        """See :meth:`Folder.write`."""
        target, size = self._full(path), memoryview(data).nbytes

        def put() -> None:
            place = target
            if self.filesystem.type_name not in _OBJECT_STORES:
                folder, name = posixpath.split(target)
                self.filesystem.create_dir(folder, recursive=True)
                place = f"{folder}/.{name}.tmp"
            with self.filesystem.open_output_stream(place) as file:
                file.write(data)
            if place != target:
                self.filesystem.move(place, target)
            if (arrived := self.filesystem.get_file_info(target).size) != size:
                raise OSError(f"{arrived} of {size} bytes arrived")

        try:
            self._try(f"write {path}", put)
        except FileNotFoundError as error:
            raise self._error(f"write {path}", error) from error

    def size(self, path: str) -> int | None:
        """See :meth:`Folder.size`."""
        info = self._try(
            f"look for {path}", lambda: self.filesystem.get_file_info(self._full(path))
        )
        return info.size if info.is_file else None

    def list(self, folder: str = "") -> dict[str, int]:
        """See :meth:`Folder.list`."""
        return {path: info.size for path, info in self.infos(folder).items()}

    def infos(self, folder: str = "") -> dict[str, fs.FileInfo]:
        """Every file below ``folder``, by path, with its size and time."""
        selector = fs.FileSelector(self._full(folder), allow_not_found=True, recursive=True)
        found = self._try(f"list {folder or 'it'}", lambda: self.filesystem.get_file_info(selector))
        return {info.path[len(self.root) + 1 :]: info for info in found if info.is_file}

    def names(self) -> set[str]:
        """See :meth:`Folder.names`."""
        selector = fs.FileSelector(self.root, allow_not_found=True)
        return {
            info.base_name
            for info in self._try("list it", lambda: self.filesystem.get_file_info(selector))
        }

    def delete(self, path: str) -> None:
        """See :meth:`Folder.delete`."""

        def remove() -> None:
            # By a try whose answer was lost, or never there.
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(self._full(path))

        self._try(f"delete {path}", remove)

    def download(self, path: str, target: Path) -> None:
        """Copy a file to this machine; ``target`` may be left in part on an error."""

        def get() -> None:
            with (
                self.filesystem.open_input_file(self._full(path)) as file,
                target.open("wb") as copy,
            ):
                while piece := file.read(PIECE):
                    copy.write(piece)

        try:
            self._try(f"read {path}", get)
        except FileNotFoundError as error:
            raise self._error(f"read {path}", error) from error

    def upload(self, source: Path, path: str) -> None:
        """Copy a file of this machine here."""
        if not source.stat().st_size:
            return self.write(path, b"")
        with pa.memory_map(str(source)) as data:
            return self.write(path, data.read_buffer())

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _try(self, what: str, work: Callable[[], T]) -> T:
        for attempt in range(1, TRIES + 1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt == TRIES or _hopeless(error):
                    raise self._error(what, error) from error
                logger.warning("%s: cannot %s (try %d)", self.location, what, attempt)
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last try returns or raises")

    def _error(self, what: str, error: OSError) -> StorageError:
        reason = " ".join(str(error).split())
        return StorageError(
            f"'{self.location}': cannot {what} ({reason:.300}): see that the storage can be "
            f"reached and that you may use it, then run the same command again to continue"
        )


def _hopeless(error: OSError) -> bool:
    here = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    refused = isinstance(error, PermissionError) or any(word in str(error) for word in _FINAL)
    return here or refused
