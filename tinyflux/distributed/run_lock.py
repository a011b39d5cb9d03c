"""One training at a time in a run's directory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tinyflux.errors import TrainingError
from tinyflux.util.locks import LockHeld, held_at_once
from tinyflux.util.text import first_line
from tinyflux.util.urls import is_url

LOCK = ".training.lock"


def wait_until_free(run_dir: str, seconds: float) -> None:
    """Wait so long at most for another training in the directory to end, as one that was killed."""
    path = Path(run_dir) / LOCK
    if path.exists():
        with suppress(Timeout), FileLock(path).acquire(timeout=seconds):
            pass


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
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held_at_once(path))
        except LockHeld as held:
            raise TrainingError(
                f"{run_dir} is being trained by {held}: wait for it, end it, or use another run_dir"
            ) from None
        except OSError as error:
            raise TrainingError(f"{run_dir} cannot be written: {first_line(error)}") from error
        yield
