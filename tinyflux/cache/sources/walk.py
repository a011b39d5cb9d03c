"""The files of a folder of this machine, each once, and where its links lead."""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Of a link that leads to nothing, or to itself.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True, slots=True)
class Found:
    """A file, or a link that is not followed.

    Attributes:
        size: in bytes.
        version: changes with the content: the time of the last change in nanoseconds, 0 where the
            storage knows none, or a digest where it knows that.
        outside: it is a link that leads out of bounds; its size and version are 0.
        directory: it is a link to a directory.
    """

    size: int = 0
    version: int | str = 0
    outside: bool = False
    directory: bool = False


NOTHING = Found()


def walk(
    root: str, bounds: str | None, enters: Callable[[str], bool]
) -> Iterator[tuple[str, Found]]:
    """Every file below ``root`` by its relative path, in no order worth knowing.

    A directory is read once, however many links lead to it, and under its own name if it has one
    below ``root``. Links that lead nowhere are passed over.

    Args:
        bounds: the real path of a directory; a link out of it is given and not followed. None
            follows all.
        enters: whether to read the directory of a relative path.

    Raises:
        UnicodeEncodeError: a name that is not UTF-8.
    """
    known: set[str] = set()
    directories, links = deque([""]), deque[str]()
    while directories or links:
        # Links last: what they lead to may have a name of its own.
        folder = directories.popleft() if directories else links.popleft()
        real = os.path.realpath(os.path.join(root, folder))
        if real in known:
            continue
        known.add(real)
        with os.scandir(os.path.join(root, folder)) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            entry.name.encode()
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                found = _led_to(entry.path, bounds)
                if found.directory and not found.outside:
                    if enters(path):
                        links.append(path)
                elif found is not NOTHING:
                    yield path, found
            elif entry.is_dir():
                if enters(path):
                    directories.append(path)
            elif entry.is_file():
                state = entry.stat()
                yield path, Found(state.st_size, state.st_mtime_ns)


def _led_to(link: str, bounds: str | None) -> Found:
    real = os.path.realpath(link)
    outside = bounds is not None and not is_below(real, bounds)
    try:
        state = os.stat(real)
    except OSError as error:
        if error.errno in _NOWHERE:
            return NOTHING
        if outside:
            return Found(outside=True)
        raise
    if outside or stat.S_ISDIR(state.st_mode):
        return Found(outside=outside, directory=stat.S_ISDIR(state.st_mode))
    if not stat.S_ISREG(state.st_mode):
        return NOTHING  # such as a device
    return Found(state.st_size, state.st_mtime_ns)


def is_below(path: str, folder: str) -> bool:
    """Whether a real path is that of ``folder``, or of something in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
