"""The HTTP side's way to the engines: it waits, tries again and gives up in good time."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from tinyflux.inference.config import PixelLimits
from tinyflux.inference.events import Drawn, Step
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.errors import ApiError
from tinyflux.serving.events import Accepted, Event
from tinyflux.serving.metrics import PictureMetrics

if TYPE_CHECKING:  # their processes load models, this one does not
    from tinyflux.serving.replica import EngineReplica
    from tinyflux.serving.shared import SharedState

# A picture that is lost with its replica is drawn again; one that kills replicas is not for ever.
MAX_TRIES = 3
READY_SECONDS = 2.0

logger = logging.getLogger("ray.serve")


class EngineClient:
    """Draws with whichever replica has room.

    Args:
        engines: handles of :class:`~tinyflux.serving.replica.EngineReplica` by model; the first is
            for requests that name none.
        shared: the handle of :class:`~tinyflux.serving.shared.SharedState`.
    """

    def __init__(
        self,
        config: ServeConfig,
        engines: "Mapping[str, DeploymentHandle[EngineReplica]]",
        shared: "DeploymentHandle[SharedState]",
    ):
        self.config, self._engines, self._shared = config, engines, shared
        self.started = int(time.time())
        self._metrics = PictureMetrics()
        self._limits: dict[str, PixelLimits] = {}

    @property
    def models(self) -> list[str]:
        """Names of what is served, the default first."""
        return list(self._engines)

    def choose(self, model: str | None) -> str:
        """The model that a request means.

        Raises:
            ApiError: 404, there is none of that name.
        """
        if model is None:
            return self.models[0]
        if model not in self._engines:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model '{model:.60}': {known}", "model", "model_not_found"
            )
        return model

    async def draw(
        self, model: str, request: SampleRequest, every_step: bool = False
    ) -> AsyncGenerator[Event, None]:
        """What happens to one picture: previews, and in the end :class:`Drawn`.

        A replica that dies takes nothing with it: another one draws the picture from its seed,
        and steps that were told are not told again. :class:`Accepted` comes first and once.

        Args:
            every_step: tell of steps without a preview, too.

        Raises:
            ApiError: it is refused, not drawn in time, lost with too many replicas, or failed by
                itself.
        """
        if self.config.log_prompts:
            logger.info("%s draws %r (not %r)", model, request.prompt, request.negative_prompt)
        started, reader, lost = time.monotonic(), _Reader(), 0
        clock = self._metrics.clock(model, request.height, request.width)
        while lost < MAX_TRIES:
            try:
                async with aclosing(self._once(model, request, every_step, started)) as events:
                    async for event in events:
                        if isinstance(event, ApiError):
                            # What was promised a place waits for another when that one is gone.
                            broken = event.status == 503
                            if not broken and not (reader.accepted and event.status == 429):
                                raise event
                            lost += broken
                            await asyncio.sleep(event.retry_after or 1.0)
                            break
                        if not reader.knows(event):
                            clock.saw(event)
                            yield event
                        if isinstance(event, Drawn):
                            return
            except RayActorError as error:
                lost += 1
                self._metrics.lost(model)
                logger.warning("a replica of %s was lost: %s", model, type(error).__name__)
        raise ApiError(
            503, f"the picture was lost with {MAX_TRIES} replicas: try again later", retry_after=5
        )

    async def picture(self, model: str, request: SampleRequest) -> Drawn:
        """The picture; see :meth:`draw`."""
        async with aclosing(self.draw(model, request)) as events:
            async for event in events:
                if isinstance(event, Drawn):
                    return event
        raise AssertionError("draw ends with a picture or an error")

    async def limits(self, model: str) -> PixelLimits:
        """The sizes that can be asked of a model."""
        if model not in self._limits:
            self._limits[model] = await self._engines[model].limits.remote()
        return self._limits[model]

    async def ready(self, model: str) -> bool:
        """Whether a replica of ``model`` answers now."""
        try:
            await asyncio.wait_for(self._engines[model].limits.remote(), READY_SECONDS)
        except Exception:  # whatever is wrong, it is not ready
            return False
        return True

    async def keep(self, png: bytes) -> str:
        """Keep a picture for a while; its name."""
        name: str = await self._shared.keep.remote(png)
        return name

    async def kept(self, name: str) -> bytes | None:
        """A picture by its name, if it is still kept."""
        png: bytes | None = await self._shared.kept.remote(name)
        return png

    async def reload(self, model: str) -> None:
        """Have every replica of ``model`` read its checkpoint again."""
        await self._shared.call_reload.remote(model)

    async def replicas(self) -> list[dict[str, Any]]:
        """What every replica says of itself."""
        replicas: list[dict[str, Any]] = await self._shared.present.remote()
        return replicas

    async def _once(
        self, model: str, request: SampleRequest, every_step: bool, started: float
    ) -> AsyncGenerator[Event, None]:
        """One try; it is cancelled at the replica when nobody listens any more.

        Raises:
            RayActorError: the replica was lost.
            ApiError: it could not be asked, or the time is up.
        """
        with _told_as_api_errors(model):
            handle = self._engines[model].options(stream=True)
            stream = cast(
                "DeploymentResponseGenerator[Event]", handle.draw.remote(request, every_step)
            )
            events, ended = aiter(stream), False
            try:
                while not ended:
                    event = await self._next(events, started)
                    ended = isinstance(event, Drawn | ApiError)
                    yield event
            finally:
                if not ended:
                    stream.cancel()

    async def _next(self, events: AsyncIterator[Event], started: float) -> Event:
        """A replica's next event, which is to come before the picture's time is up."""
        left = started + self.config.timeout_s - time.monotonic()
        try:
            return await asyncio.wait_for(anext(events), max(left, 0.0))
        except StopAsyncIteration:
            raise RuntimeError("a replica's story ended without its end") from None
        except asyncio.TimeoutError:
            raise ApiError(
                503,
                f"the picture was not drawn within {self.config.timeout_s:g} s: ask for less, or "
                "try again later",
                retry_after=self.config.timeout_s,
            ) from None


@dataclass
class _Reader:
    """What the reader of a picture's events has been told.

    Attributes:
        accepted: that there is a place for it; ``step``: the last one that was done.
    """

    accepted: bool = False
    step: int = 0

    def knows(self, event: Event) -> bool:
        """Whether an event is no news; else it is known from now on."""
        if isinstance(event, Accepted) and self.accepted:
            return True
        if isinstance(event, Step):
            if event.step <= self.step:
                return True
            self.step = event.step
        self.accepted = True
        return False


@contextmanager
def _told_as_api_errors(model: str) -> Iterator[None]:
    """Turn what Ray raises, but for the loss of a replica, into what a client can be told."""
    try:
        yield
    except (RayActorError, ApiError):
        raise
    except RayServeException as error:
        raise ApiError(
            503, f"the model '{model}' has no replica that works", retry_after=5
        ) from error
    except Exception as error:
        # The replica lives: what it could not be sent, read or answer, no other one can.
        logger.exception("a replica of %s could not be asked", model)
        raise ApiError(500, "the server failed at this request; its log says how") from error
