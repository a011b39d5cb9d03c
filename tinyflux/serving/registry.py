"""What all replicas share: pictures to be fetched by name, calls to reload, and who is there."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tinyflux.serving.config import ServeConfig

# A replica reports once a second; one that is silent for longer is gone or stuck.
PRESENT_SECONDS = 10.0


@dataclass(frozen=True)
class Report:
    """What a replica of an engine last said of itself."""

    model: str
    replica: str
    figures: dict[str, Any]
    at: float


class ReplicaRegistry:
    """One actor for the whole application; all of it is in memory and bounded.

    Pictures are kept under names that cannot be guessed, ``keep_pictures`` at most and
    ``keep_seconds`` long.
    """

    def __init__(self, config: ServeConfig):
        self._config = config
        self._pictures: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._calls: dict[str, str] = {}
        self._reports: dict[str, Report] = {}

    async def keep(self, png: bytes) -> str:
        """Keep a picture; its name."""
        self._forget()
        name = secrets.token_urlsafe(24)
        self._pictures[name] = (time.monotonic(), png)
        while len(self._pictures) > self._config.keep_pictures:
            self._pictures.popitem(last=False)
        return name

    async def kept(self, name: str) -> bytes | None:
        """The picture of that name, if it is still kept."""
        self._forget()
        return self._pictures.get(name, (0.0, None))[1]

    async def call_reload(self, model: str) -> None:
        """Ask every replica of ``model`` to read its checkpoint again."""
        self._calls[model] = secrets.token_hex(8)

    async def report(self, model: str, replica: str, figures: dict[str, Any]) -> str | None:
        """Take a replica's figures; the last call to reload its model, if there was one."""
        self._reports[replica] = Report(model, replica, figures, time.monotonic())
        return self._calls.get(model)

    async def present(self) -> list[dict[str, Any]]:
        """The figures of every replica that is there."""
        since = time.monotonic() - PRESENT_SECONDS
        self._reports = {name: r for name, r in self._reports.items() if r.at >= since}
        return [
            {"model": report.model, "replica": report.replica, **report.figures}
            for report in self._reports.values()
        ]

    def _forget(self) -> None:
        since = time.monotonic() - self._config.keep_seconds
        while self._pictures and next(iter(self._pictures.values()))[0] < since:
            self._pictures.popitem(last=False)
