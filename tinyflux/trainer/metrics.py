"""Where a run's numbers go: a JSON Lines file, which is the run's own record, and trackers."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from tinyflux.trainer.trackers import Tracker
from tinyflux.util.files import atomic_write


class MetricLog:
    """Appends records to ``path`` and tells the trackers.

    Args:
        path: a JSON Lines file; records after ``step`` are dropped, as those of a run that was
            killed after its last checkpoint.
        step: the step that the run starts from.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker], step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step else []
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._known = {(record["step"], name) for record in kept for name in record}
        self._file: TextIO = path.open("a", buffering=1)
        self._trackers = list(trackers)

    def has(self, step: int, name: str) -> bool:
        """Whether an earlier part of the run recorded ``name`` at ``step``."""
        return (step, name) in self._known

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record, in which null is a number that is not finite."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        finite = {name: value for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.write(step, finite)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """An RGB image, for the trackers."""
        for tracker in self._trackers:
            tracker.picture(step, name, image)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, as of :func:`parse_metrics`; none where there is no file."""
    return parse_metrics(path.read_bytes()) if path.exists() else []


def parse_metrics(content: bytes) -> list[dict[str, Any]]:
    """The records in a metrics file; a line that is none, as of a crash, is left out."""
    records = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def best_record(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first record with the lowest held-out velocity loss of the EMA, or None without any."""
    looked = [record for record in records if record.get("val_velocity_ema") is not None]
    return min(looked, key=lambda record: record["val_velocity_ema"], default=None)
