"""Checkpoints written beside training."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one write at a time in a thread and hands its error to the caller's thread.

    What is to be written must be a copy: it is read while training goes on.
    """

    def __init__(self) -> None:
        # Its thread is joined when the interpreter ends, so a write is never cut off by that.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start ``write`` once the one before is done; raises that one's error."""
        self.wait()
        self._pending = self._pool.submit(write)

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._pending is not None and not self._pending.done()

    def check(self) -> None:
        """Raise the error of a write that has failed; never waits."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way; raises its error, once."""
        pending = self._pending
        if pending is not None:
            try:
                pending.result()
            finally:
                # Not if it was the wait that was interrupted: close() must still see the write.
                if pending.done():
                    self._pending = None

    def close(self) -> None:
        """Wait for the write under way and end the thread.

        An error that nobody has seen is logged, not raised: another one may be on its way.
        """
        self._pool.shutdown(wait=True)
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
