"""Copies on this machine's disk of what lies at URLs, shared by its processes.

``TINYFLUX_LOCAL_DIR`` names the directory, else it is in the system's temporary one; a node's fast
disk is the right place. ``TINYFLUX_LOCAL_GIB`` bounds the copies: those that were used longest ago
make room. Processes that have one open keep what they see.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from tinyflux.errors import ConfigError, StorageError
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.files import file_sha256
from tinyflux.util.urls import is_url

DIRECTORY, GIB = "TINYFLUX_LOCAL_DIR", "TINYFLUX_LOCAL_GIB"
DEFAULT_GIB = 100.0
FILES, FOLDERS = "files", "folders"
# What was fetched a moment ago may not be open yet, so it stays, whatever the bound.
RECENT_SECONDS = 120.0


def local_directory() -> Path:
    """Where copies are kept; nobody else may write there.

    Raises:
        ConfigError: it is another user's.
    """
    default = Path(tempfile.gettempdir()) / f"tinyflux-{os.getuid()}"
    place = Path(os.environ.get(DIRECTORY) or default)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise ConfigError(f"'{place}' belongs to another user: set {DIRECTORY} to a directory")
    return place


def copy_of(folder: RemoteFolder, path: str, size: int, sha256: str) -> Path:
    """A file of ``folder`` on this machine, fetched if it is not there.

    Raises:
        StorageError: it cannot be fetched, or is not what ``sha256`` says.
    """
    target = local_directory() / FILES / sha256
    with _locked(sha256[:2]):
        if not _is_whole(target, size):
            with _temporary(size) as work:
                part = work / "part"
                folder.download(path, part)
                if (found := file_sha256(part)) != sha256:
                    raise StorageError(
                        f"'{folder.location}/{path}' is damaged (its checksum is {found[:12]}, "
                        f"not {sha256[:12]}): `tinyflux cache repair` makes it again"
                    )
                os.replace(part, target)
        os.utime(target)
    return target


def fetch(location: str, names: Collection[str] = ()) -> str:
    """A folder at a URL as a directory of this machine; a path is given back as it is.

    A folder that has changed since is fetched again.

    Args:
        names: of the files that are wanted; empty: all.

    Raises:
        StorageError: there is nothing, or it cannot be fetched.
    """
    if not is_url(location):
        return location
    folder = RemoteFolder(location)
    wanted = {
        path: [info.size, info.mtime_ns]
        for path, info in sorted(folder.infos().items())
        if not names or path in names
    }
    if not wanted:
        raise StorageError(f"there is nothing at '{location}': check the URL")
    version = hashlib.sha256(json.dumps([location, wanted]).encode()).hexdigest()
    target = local_directory() / FOLDERS / version
    with _locked(version[:2]):
        if not target.exists():
            with _temporary(sum(size for size, _ in wanted.values())) as work:
                for path in wanted:
                    (work / "part" / path).parent.mkdir(parents=True, exist_ok=True)
                    folder.download(path, work / "part" / path)
                (work / "part").rename(target)
        os.utime(target)
    return str(target)


def _make_room(size: int) -> None:
    text = os.environ.get(GIB) or DEFAULT_GIB
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise ConfigError(f"{GIB} must be a number of GiB, not '{text}'") from None
    places = [place for kind in (FILES, FOLDERS) for place in (local_directory() / kind).iterdir()]
    there = []
    for place in places:
        with suppress(FileNotFoundError):  # another process made room
            there.append((place.stat().st_mtime_ns, _size(place), place))
    used = sum(taken for _, taken, _ in there)
    recent = (time.time() - RECENT_SECONDS) * 1e9
    for used_at, taken, place in sorted(there):
        if used + size <= limit or used_at > recent:
            return
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
        used -= taken


def _size(place: Path) -> int:
    if place.is_dir():
        return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return place.stat().st_size


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time, so that a file is fetched once by all that want it."""
    folder = local_directory() / "locks"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / name):
        yield


@contextmanager
def _temporary(size: int) -> Iterator[Path]:
    """A directory for what will be moved to its place, with room for so many bytes."""
    for kind in (FILES, FOLDERS):
        (local_directory() / kind).mkdir(exist_ok=True)
    _make_room(size)
    work = Path(tempfile.mkdtemp(dir=local_directory(), prefix="part."))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
