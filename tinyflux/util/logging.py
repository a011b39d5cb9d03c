"""The library's log lines on a console: what it does on stdout, what went wrong on stderr.

The library only logs. A process whose lines are for people, or a worker of Ray's, whose lines reach
the driver's console, calls :func:`log_to_console` at its start.
"""

import logging
import sys

LIBRARY = "tinyflux"


class _ConsoleHandler(logging.Handler):
    """Bare messages, each written at once to the stream that is the process's at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            print(self.format(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Show the library's messages from INFO on; once in a process, however often it is called."""
    logger = logging.getLogger(LIBRARY)
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
