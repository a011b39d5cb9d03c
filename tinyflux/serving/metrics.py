"""The server's figures for Prometheus, through Ray's metrics agents; docs/serving.md lists them."""

from math import ceil, log2
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import Scope

_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160]


class RequestMetrics:
    """Requests by where they went and how they ended."""

    def __init__(self) -> None:
        self._requests = Counter(
            "tinyflux_serve_requests",
            description="HTTP requests answered.",
            tag_keys=("route", "status"),
        )

    def count(self, scope: Scope, status: int) -> None:
        """One answer; addresses that no route knows are one label, so labels are few."""
        route = getattr(scope.get("route"), "path", "none")
        self._requests.inc(tags={"route": route, "status": str(status)})


class PictureMetrics:
    """How long pictures take, as the HTTP side sees it."""

    def __init__(self) -> None:
        self._latency = Histogram(
            "tinyflux_serve_latency_seconds",
            description="From a request to its whole picture.",
            boundaries=_SECONDS,
            tag_keys=("model", "size"),
        )
        self._preview = Histogram(
            "tinyflux_serve_first_preview_seconds",
            description="From a request to its first preview.",
            boundaries=_SECONDS,
            tag_keys=("model",),
        )
        self._retries = Counter(
            "tinyflux_serve_retries",
            description="Pictures begun again because a replica was lost.",
            tag_keys=("model",),
        )

    def drawn(self, model: str, height: int, width: int, seconds: float) -> None:
        self._latency.observe(seconds, tags={"model": model, "size": size_label(height, width)})

    def previewed(self, model: str, seconds: float) -> None:
        self._preview.observe(seconds, tags={"model": model})

    def retried(self, model: str) -> None:
        self._retries.inc(tags={"model": model})


class EngineMetrics:
    """What an engine is doing, read from its ``stats()`` once a second."""

    def __init__(self, model: str) -> None:
        self._gauges = {
            key: Gauge(f"tinyflux_serve_{key}", description=text, tag_keys=("model",))
            for key, text in (
                ("queue_length", "Pictures that wait for a place in the running batch."),
                ("batch_size", "Pictures in the running batch."),
                ("step_seconds", "Mean seconds of a denoising step."),
                ("cached_prompts", "Encoded prompts that are kept."),
            )
        }
        self._steps = Counter(
            "tinyflux_serve_steps", description="Denoising steps done.", tag_keys=("model",)
        )
        self._tags, self._done = {"model": model}, 0

    def tell(self, stats: dict[str, Any]) -> None:
        for key, gauge in self._gauges.items():
            gauge.set(stats[key], tags=self._tags)
        if (steps := stats["steps"] - self._done) > 0:
            self._steps.inc(steps, tags=self._tags)
            self._done = stats["steps"]


def size_label(height: int, width: int) -> str:
    """The side of the smallest square of a power of two that has the picture's area."""
    return str(2 ** ceil(log2(height * width) / 2))
