"""The replica of an engine: it draws, says how it is, and follows its checkpoint."""

import dataclasses
import logging
import threading
import time
from collections.abc import AsyncGenerator

from ray import serve
from ray.serve.handle import DeploymentHandle

from tinyflux.distributed.weights import load_student, signature
from tinyflux.errors import InputError, OverloadedError, ServingError, TinyFluxError
from tinyflux.inference.config import PixelLimits
from tinyflux.inference.events import Drawn
from tinyflux.inference.request import SampleRequest
from tinyflux.model.config import ZooConfig
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.serving.errors import ApiError
from tinyflux.serving.events import Accepted, Event
from tinyflux.serving.metrics import EngineMetrics
from tinyflux.serving.shared import SharedState
from tinyflux.util.device import resolve_device
from tinyflux.util.urls import is_url

REPORT_SECONDS = 1.0
URL_SECONDS = 30.0  # between looks at a checkpoint that costs money to look at
# About how long Ray Serve takes to see that an engine is broken.
BROKEN_SECONDS = 6.0

logger = logging.getLogger("ray.serve")


class EngineReplica:
    """One model's engine in a Ray Serve replica.

    Args:
        name: the model's, as requests say it.
        checkpoint: what it serves; read again when the registry calls for it, or when it changes
            and ``config.watch_checkpoint`` is set.
        shared: the handle of :class:`~tinyflux.serving.shared.SharedState`.
    """

    def __init__(
        self,
        config: ServeConfig,
        zoo: ZooConfig,
        name: str,
        checkpoint: str,
        shared: "DeploymentHandle[SharedState]",
    ):
        self._name, self._checkpoint, self._shared = name, checkpoint, shared
        self._watch, self._adapters = config.watch_checkpoint, config.adapters
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._metrics = EngineMetrics(name)
        self._seen = signature(checkpoint)
        self._zoo = zoo
        self._engine = open_engine(dataclasses.replace(config, checkpoint=checkpoint), zoo)
        self._reloads, self._last_error, self._looked = 0, "", time.monotonic()
        self._ended = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._follower.start()

    async def draw(self, request: SampleRequest, every_step: bool) -> AsyncGenerator[Event, None]:
        """Draw one picture; a caller that goes away frees its place in the batch.

        Args:
            every_step: tell of steps without a preview, too.
        """
        try:
            handle = self._engine.submit(request)
        except OverloadedError as error:
            yield ApiError(429, str(error), code="overloaded", retry_after=error.retry_after)
            return
        except InputError as error:
            yield ApiError(400, str(error))
            return
        except TinyFluxError as error:
            yield ApiError(503, str(error), retry_after=BROKEN_SECONDS)
            return
        try:
            yield Accepted()
            async for event in handle.events():
                if every_step or isinstance(event, Drawn) or event.preview is not None:
                    yield event
        except InputError as error:
            yield ApiError(400, str(error))
        except TinyFluxError as error:
            yield self._failed(error)
        finally:
            handle.cancel()

    def _failed(self, error: TinyFluxError) -> ApiError:
        """Whether a picture failed by itself, or with the engine: another one may draw it then."""
        try:
            self._engine.check_health()
        except ServingError:
            return ApiError(503, str(error), retry_after=BROKEN_SECONDS)
        return ApiError(500, str(error))

    async def limits(self) -> PixelLimits:
        """The sizes that can be asked for, in pixels."""
        return self._engine.pixel_limits()

    def check_health(self) -> None:
        """Raise if the engine's loop is dead: Ray Serve then starts another replica."""
        self._engine.check_health()

    def __del__(self) -> None:
        if ended := getattr(self, "_ended", None):
            ended.set()
            self._engine.close(drain=False)

    def _follow(self) -> None:
        """Report, and read the checkpoint again when that is called for."""
        # A call from before this replica was there has been answered by its start.
        answered = self._report(None)
        while not self._ended.wait(REPORT_SECONDS):
            called, answered = answered, self._report(answered)
            if called != answered or (self._watch and self._changed()):
                self._reload()

    def _report(self, last: str | None) -> str | None:
        """Tell the registry how it goes; its call to reload, or ``last`` if it does not answer."""
        stats = self._engine.stats()
        self._metrics.tell(stats)
        figures = {**stats, "reloads": self._reloads, "last_error": self._last_error}
        try:
            report = self._shared.report.remote(self._name, self._replica, figures)
            return report.result(timeout_s=REPORT_SECONDS) or last
        except Exception as error:  # a registry that restarts is asked again
            logger.warning("the registry does not answer: %s", type(error).__name__)
            return last

    def _changed(self) -> bool:
        """Whether the checkpoint is another than the last one read, and is whole."""
        if is_url(self._checkpoint) and time.monotonic() - self._looked < URL_SECONDS:
            return False
        self._looked = time.monotonic()
        now = signature(self._checkpoint)
        return now is not None and now != self._seen

    def _reload(self) -> None:
        seen = signature(self._checkpoint)
        try:
            device = str(resolve_device(self._zoo.device))
            dtype, adapters = self._zoo.dtype, self._adapters
            self._engine.swap(load_student(self._checkpoint, device, dtype, adapters))
        except Exception as error:  # whatever is wrong with the new weights, the old ones serve
            self._last_error = str(error)
            logger.error("%s keeps its weights: %s", self._name, error)
        else:
            self._reloads, self._last_error = self._reloads + 1, ""
        self._seen = seen
