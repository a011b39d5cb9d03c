"""Files that are whole or absent."""

import errno
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyflux.errors import TrainingError

logger = logging.getLogger(__name__)

# No space, no quota, a file-size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` so that a crash at any moment leaves the old file or the new one.

    The bytes go to a temporary name in the same folder, are flushed to disk and renamed.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, which is read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def full_disk_ends_run(run: str) -> Iterator[None]:
    """Tell of a full disk in one sentence, as a :class:`TrainingError`.

    Args:
        run: names the run's directory.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise TrainingError(
            f"cannot write to {run}: {error.strerror}; make room and run again, which continues "
            "from the latest checkpoint"
        ) from error


def warn_if_readable(path: str | os.PathLike[str], what: str) -> None:
    """Warn in one line of a secret in a file that others can read.

    Where the file is another user's, such as root's, its group may be made for this process.

    Args:
        what: names the secret.
    """
    try:
        status = Path(path).stat()
    except OSError:  # whoever reads it says why it cannot be
        return
    mine = status.st_uid == os.geteuid()
    others, mend = (stat.S_IRGRP | stat.S_IROTH, "600") if mine else (stat.S_IROTH, "o=")
    if status.st_mode & others:
        logger.warning("others can read %s: chmod %s %s", what, mend, path)
