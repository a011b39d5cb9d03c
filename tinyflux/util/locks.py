"""Locks between processes, by files on a disk that they share; a process that dies lets go."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class LockHeld(Exception):
    """Another process has the lock; the text says which, as ``process 17 on node3``."""


@contextmanager
def held_at_once(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``, whose holder's name stands in a file beside it.

    Raises:
        LockHeld: somebody has it.
        OSError: the directory cannot be written.
    """
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockHeld(_named(holder)) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _named(holder: Path) -> str:
    try:
        return holder.read_text() or "another process"
    except OSError:
        return "another process"
