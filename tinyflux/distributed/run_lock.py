"""One training at a time in a run's directory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tinyflux.errors import TrainingError
from tinyflux.util.text import first_line
from tinyflux.util.urls import is_url

LOCK = ".training.lock"


@contextmanager
def claimed(run_dir: str) -> Iterator[None]:
    """Make a run's directory this process's while it trains.

    A run at a URL has no lock: object stores know none.

    Raises:
        TrainingError: another training is at work there, or the directory cannot be written.
    """
    if is_url(run_dir):
        yield
        return
    path = Path(run_dir) / LOCK
    holder = path.with_suffix(".holder")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise TrainingError(
            f"{run_dir} is being trained by {name}: wait for it, end it, or use another run_dir"
        ) from None
    except OSError as error:
        raise TrainingError(f"{run_dir} cannot be written: {first_line(error)}") from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
