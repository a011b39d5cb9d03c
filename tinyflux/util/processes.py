"""Child processes that never outlive who started them."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# For a child that was interrupted by the same Ctrl-C, and then for one that is told to end.
INTERRUPTED_SECONDS, END_SECONDS = 10.0, 60.0


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does, so that what is open is closed."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def child_process(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``command`` beside the block; at its end, however it ends, the child is ended too.

    It is told to end by SIGTERM, waited for, and killed only if that takes a minute.
    """
    child = subprocess.Popen(command, cwd=cwd, env=dict(environment))
    try:
        yield child
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):
            child.wait(INTERRUPTED_SECONDS)
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
