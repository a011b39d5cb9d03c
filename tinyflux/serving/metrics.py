"""The server's figures for Prometheus, through Ray's metrics agents; docs/serving.md lists them."""

import time
from collections.abc import Callable
from math import ceil, log2
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import Scope

from tinyflux.inference.engine import EngineStats
from tinyflux.inference.events import Drawn, Step
from tinyflux.serving.events import Event

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
        self._lost = Counter(
            "tinyflux_serve_lost_replicas",
            description="Pictures begun again because a replica was lost.",
            tag_keys=("model",),
        )

    def lost(self, model: str) -> None:
        self._lost.inc(tags={"model": model})

    def clock(self, model: str, height: int, width: int) -> "PictureClock":
        """Times one picture, from now."""
        tags = {"model": model}
        size = {**tags, "size": size_label(height, width)}
        return PictureClock(
            lambda seconds: self._preview.observe(seconds, tags=tags),
            lambda seconds: self._latency.observe(seconds, tags=size),
        )


class PictureClock:
    """Tells when a picture had its first preview, and when it was drawn."""

    def __init__(self, previewed: Callable[[float], None], drawn: Callable[[float], None]):
        self._started, self._waits = time.monotonic(), True
        self._previewed, self._drawn = previewed, drawn

    def saw(self, event: Event) -> None:
        """Take note of what was just sent."""
        if isinstance(event, Drawn):
            self._drawn(time.monotonic() - self._started)
        elif isinstance(event, Step) and event.preview is not None and self._waits:
            self._waits = False
            self._previewed(time.monotonic() - self._started)


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

    def tell(self, stats: EngineStats) -> None:
        figures: dict[str, Any] = {**stats}
        for key, gauge in self._gauges.items():
            gauge.set(figures[key], tags=self._tags)
        if (steps := stats["steps"] - self._done) > 0:
            self._steps.inc(steps, tags=self._tags)
            self._done = stats["steps"]


def size_label(height: int, width: int) -> str:
    """The side of the smallest square of a power of two that has the picture's area."""
    return str(2 ** ceil(log2(height * width) / 2))
