"""Copies on this machine's disk of what lies at URLs, shared by its processes.

``TINYFLUX_LOCAL_DIR`` names the directory, else it is in the system's temporary one; a node's fast
disk is the right place. ``TINYFLUX_LOCAL_GIB`` bounds the copies of caches' files: those that were
used longest ago make room.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyflux.errors import ConfigError, StorageError
from tinyflux.storage.remote import RemoteFolder, is_url

DIRECTORY, GIB = "TINYFLUX_LOCAL_DIR", "TINYFLUX_LOCAL_GIB"
DEFAULT_GIB = 100.0
VERSIONS = 2  # of a folder: a newer one may be fetched while the one before is being read


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
    files = local_directory() / "files"
    target = files / sha256
    with _locked(sha256[:2]):
        if not _is_whole(target, size):
            files.mkdir(exist_ok=True)
            _make_room(files, size)
            with _temporary(files) as work:
                part = work / "part"
                folder.download(path, part)
                if (found := _sha256(part)) != sha256:
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
    kept = local_directory() / "folders" / _digest(location)
    target = kept / _digest(json.dumps(wanted))
    with _locked(kept.name[:2]):
        if not target.exists():
            kept.mkdir(parents=True, exist_ok=True)
            with _temporary(kept) as work:
                for path in wanted:
                    (work / path).parent.mkdir(parents=True, exist_ok=True)
                    folder.download(path, work / path)
                work.rename(target)
        os.utime(target)
        by_age = sorted(kept.iterdir(), key=lambda version: version.stat().st_mtime_ns)
        for version in by_age[:-VERSIONS]:
            shutil.rmtree(version, ignore_errors=True)
    return str(target)


def _make_room(files: Path, size: int) -> None:
    text = os.environ.get(GIB) or DEFAULT_GIB
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise ConfigError(f"{GIB} must be a number of GiB, not '{text}'") from None
    there = [(entry.stat(), entry.path) for entry in os.scandir(files) if entry.is_file()]
    used = sum(state.st_size for state, _ in there)
    for state, path in sorted(there, key=lambda item: item[0].st_mtime_ns):
        if used + size <= limit:
            return
        # Processes that have it mapped keep what they see.
        Path(path).unlink(missing_ok=True)
        used -= state.st_size


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
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(dir=parent, prefix=".part."))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
