"""Training's numbers as Ray metrics, which the dashboard and Prometheus read."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from ray.util.metrics import Gauge


class RayMetrics:
    """A :class:`tinyflux.trainer.trackers.Tracker`: a gauge ``tinyflux_train_<name>`` for each.

    Args:
        run_dir: its name is the gauges' tag ``run``.
    """

    def __init__(self, run_dir: Path):
        self._tags = {"run": run_dir.name}
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in {"step": step, **values}.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(
                    f"tinyflux_train_{name}", f"Training: {name}.", tag_keys=("run",)
                )
            self._gauges[name].set(value, self._tags)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Pictures are no metrics."""

    def close(self) -> None:
        """Ray's agent keeps the last values."""
