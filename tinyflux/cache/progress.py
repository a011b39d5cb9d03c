"""How far a build is, for its terminal and for who watches it."""

import time

from tinyflux.cache.runner import Runner


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
        print(
            f"cache: {self._verb} {self._done}/{self._total} {self._unit}  "
            f"{rate:.1f} {self._unit}/s  {left:.0f} s left",
            flush=True,
        )
        self._runner.show(self._unit, self._done, self._total, rate)
