"""Numbers as Ray metrics, which the dashboard and Prometheus read."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from ray.util.metrics import Gauge


class Gauges:
    """Gauges ``tinyflux_<stage>_<name>``, made when they are first set.

    Args:
        run: what the numbers are of; the gauges' tag ``run``.
    """

    def __init__(self, stage: str, run: str):
        self._stage, self._tags = stage, {"run": run}
        self._gauges: dict[str, Gauge] = {}

    def set(self, **values: float) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                full = f"tinyflux_{self._stage}_{name}"
                self._gauges[name] = Gauge(full, full.replace("_", " "), tag_keys=("run",))
            self._gauges[name].set(value, self._tags)


class RayMetrics:
    """A :class:`tinyflux.trainer.trackers.Tracker`: a gauge ``tinyflux_train_<name>`` for each."""

    def __init__(self, run_dir: Path):
        self._gauges = Gauges("train", run_dir.name)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        self._gauges.set(step=step, **values)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Pictures are no metrics."""

    def close(self) -> None:
        """Ray's agent keeps the last values."""
