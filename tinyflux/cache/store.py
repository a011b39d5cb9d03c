"""Where a dataset lies: a directory, or a folder at a URL whose files are copied here to be read.

Each file appears whole or not at all, and the manifest, written last, says what there is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from tinyflux.cache.manifest import FileInfo
from tinyflux.errors import CacheError
from tinyflux.storage.copies import copy_of
from tinyflux.storage.folder import Folder, LocalFolder
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.locks import LockHeld, held_at_once
from tinyflux.util.urls import is_url

AT_ONCE = 16  # requests to a storage that answers each after a while
CHUNK = 1024
A = TypeVar("A")
B = TypeVar("B")


class Store(Folder, Protocol):
    """A dataset's folder."""

    def local(self, files: Sequence[FileInfo]) -> list[Path]:
        """The files on this machine's disk, whole, to be read by memory map."""
        ...

    def each(self, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """``work`` of every item, in order; side by side where each waits for the storage."""
        ...

    @contextmanager
    def held(self, mark: str) -> Iterator[None]:
        """Keep other build jobs out, by a lock beside file ``mark``; CacheError if one is in."""
        ...


class LocalStore(LocalFolder):
    """A directory."""

    def local(self, files: Sequence[FileInfo]) -> list[Path]:
        """See :meth:`Store.local`."""
        return [self.directory / file.path for file in files]

    def each(self, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """See :meth:`Store.each`."""
        return map(work, items)

    @contextmanager
    def held(self, mark: str) -> Iterator[None]:
        """See :meth:`Store.held`."""
        with ExitStack() as stack:
            try:
                stack.enter_context(held_at_once(self.directory / f".{mark}.lock"))
            except LockHeld as holder:
                raise CacheError(
                    f"another job is working on the cache at '{self.location}' ({holder}): wait "
                    "for it to end"
                ) from None
            for leftover in self.directory.rglob(".*.tmp"):  # of writers that were killed
                leftover.unlink(missing_ok=True)
            yield


class RemoteStore(RemoteFolder):
    """A folder at a URL."""

    def local(self, files: Sequence[FileInfo]) -> list[Path]:
        """See :meth:`Store.local`."""
        return list(self.each(self._copy, files))

    def each(self, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """See :meth:`Store.each`."""
        left = iter(items)
        while chunk := list(islice(left, CHUNK)):
            with ThreadPoolExecutor(min(AT_ONCE, len(chunk))) as pool:
                yield from pool.map(work, chunk)

    def _copy(self, file: FileInfo) -> Path:
        return copy_of(self, file.path, file.bytes, file.sha256)

    @contextmanager
    def held(self, mark: str) -> Iterator[None]:
        """No lock: object stores have none that pyarrow knows.

        Two jobs do the same work twice and end with one dataset, because files are named by what
        is in them.
        """
        yield


def open_store(location: str | Path) -> Store:
    """The dataset's folder at a path or URL; it need not be there yet."""
    return RemoteStore(str(location)) if is_url(str(location)) else LocalStore(location)
