"""How far a build is, for its terminal and for who watches it."""

import logging
import time

from tinyflux.cache.runner import Runner

logger = logging.getLogger(__name__)


class Progress:
    """A line per piece: done, rate, time left."""

    def __init__(self, runner: Runner, verb: str, unit: str, total: int, done: int):
        self._runner, self._verb, self._unit = runner, verb, unit
        self._total, self._done, self._first = total, done, done
        self._started = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        seconds = time.monotonic() - self._started
        rate = (self._done - self._first) / max(seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        logger.info(
            "cache: %s %d/%d %s  %.1f %s/s  %.0f s left",
            self._verb, self._done, self._total, self._unit, rate, self._unit, left,
        )  # fmt: skip
        self._runner.show(self._unit, self._done, self._total, rate)
