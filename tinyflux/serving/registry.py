"""Which replicas there are, how each is doing, and calls to reload."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

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
    """The replicas that report, and the last call to reload each model."""

    def __init__(self) -> None:
        self._calls: dict[str, str] = {}
        self._reports: dict[str, Report] = {}

    def call_reload(self, model: str) -> None:
        """Ask every replica of ``model`` to read its checkpoint again."""
        self._calls[model] = secrets.token_hex(8)

    def report(self, model: str, replica: str, figures: dict[str, Any]) -> str | None:
        """Take a replica's figures; the last call to reload its model, if there was one."""
        self._reports[replica] = Report(model, replica, figures, time.monotonic())
        return self._calls.get(model)

    def present(self) -> list[dict[str, Any]]:
        """The figures of every replica that is there."""
        since = time.monotonic() - PRESENT_SECONDS
        self._reports = {name: r for name, r in self._reports.items() if r.at >= since}
        return [
            {"model": report.model, "replica": report.replica, **report.figures}
            for report in self._reports.values()
        ]
