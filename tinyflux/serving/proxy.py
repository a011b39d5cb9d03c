"""What Ray Serve's HTTP proxies do beside their own, where their environment has :data:`HOOK`.

A proxy takes requests before any replica of ours does, and answers some by itself in plain text,
such as those whose replica died. This module is imported there, so it needs neither torch nor Ray.
"""

import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyflux.serving.errors import ApiError

HOOK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "tinyflux.serving.proxy.middlewares"}
# Ray's own addresses, for probes: what they answer is documented by Ray.
_RAYS = "/-/"
# By these, clients would tell Ray how long their requests may take, that they go on when nobody
# listens, and which replica is to answer. Ray reads the last two with `_` for `-`, too.
_DIRECTIONS = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)
_REQUEST_ID = b"x-request-id"  # goes into logs, and back to the client
_MAX_ID = 128
_RETRY_SECONDS = 5.0
_SENTENCES = {404: "nothing is served at this address now", 503: "nothing can answer now"}

logger = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for in each of its proxies."""
    return [Middleware(Outermost)]


class Outermost:
    """ASGI middleware that gives a proxy's own errors the shape that ours have."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_RAYS):
            await self._app(scope, receive, send)
            return
        started = replaced = False

        async def shaped(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started, replaced = True, _is_plain_error(message)
                if replaced:
                    await _instead(message["status"]).answer()(scope, receive, send)
            if not replaced:
                await send(message)

        error = ApiError(503, "what answered this was lost: try again", retry_after=_RETRY_SECONDS)
        try:
            await self._app(_without_directions(scope), receive, shaped)
        except Exception:
            if started:
                raise
            logger.exception("a proxy failed at a request")
            error = ApiError(500, "the server failed at this request; its log says how")
        if not started:
            await error.answer()(scope, receive, send)


def _without_directions(scope: Scope) -> Scope:
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if name.replace(b"_", b"-") not in _DIRECTIONS
        and not (name == _REQUEST_ID and (len(value) > _MAX_ID or not value.isascii()))
    ]
    return {**scope, "headers": kept}


def _is_plain_error(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return start["status"] >= 400 and kind.startswith("text/plain")


def _instead(status: int) -> ApiError:
    sentence = _SENTENCES.get(status, f"Ray Serve refused this request with status {status}")
    return ApiError(status, sentence, retry_after=_RETRY_SECONDS if status in (429, 503) else None)
