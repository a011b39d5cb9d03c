"""What every request passes first: names, key, size and time, and what browsers are told."""

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyflux.serving.config import ServeConfig
from tinyflux.serving.errors import ApiError
from tinyflux.serving.http.auth import ApiKeys, is_loopback
from tinyflux.serving.http.errors import shown
from tinyflux.serving.metrics import RequestMetrics

# Open to everyone: no pictures are drawn there, and a kept picture's name is its own secret.
_OPEN = ("/page/", "/static-offline-docs/", "/v1/images/files/")
_OPEN_EXACTLY = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
# Load balancers and probes ask here by an address of their own choice, and learn nothing else.
_HEALTH = ("/healthz", "/readyz")
_WITH_BODY = ("POST", "PUT", "PATCH")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
_MAX_DIGITS = 18  # of a Content-Length; servers refuse more before it comes here


class RequestGuard:
    """ASGI middleware that refuses before a body is read, or while it does not come.

    ``HEAD`` is answered as ``GET``, without the body.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: ApiKeys):
        self._app, self._config, self._keys = app, config, keys
        self._names = KnownNames(config) if _checks_names(config) else None
        self._metrics = RequestMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                self._metrics.count(scope, message["status"])
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._check(scope)
            if scope["method"] in _WITH_BODY:
                receive = await self._whole_body(receive)
        except ApiError as refusal:
            await refusal.answer()(scope, receive, told)
        else:
            await self._app(scope, receive, told)

    async def _check(self, scope: Scope) -> None:
        """Raise an :class:`ApiError` if the request's head is enough to refuse it."""
        headers, path = Headers(scope=scope), scope["path"]
        is_open = path in _OPEN_EXACTLY or path.startswith(_OPEN)
        if self._keys:
            if not is_open and not self._keys.admit(headers.get("authorization", "")):
                raise ApiError(
                    401,
                    "this server needs an API key: send the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        elif not self._config.allow_public and not _from_here(scope):
            # `serve deploy` chooses the host without asking this config.
            raise ApiError(
                403,
                "this server answers its own machine only: its owner can set serve.api_keys_file",
            )
        if self._names is not None and path not in _HEALTH:
            await self._names.check(scope)
        if scope["method"] in _WITH_BODY:
            limit, length = self._config.max_body_bytes, headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                raise ApiError(411, "a request must say its Content-Length")
            if len(length) > _MAX_DIGITS or int(length) > limit:
                raise ApiError(
                    413,
                    f"the body has {shown(length)} bytes, the limit is {limit}",
                    closes=True,
                )

    async def _whole_body(self, receive: Receive) -> Receive:
        """Wait for the body, ``receive_seconds`` at most; what gives it again."""
        seconds = self._config.receive_seconds
        end, parts = time.monotonic() + seconds, list[Message]()
        while not parts or parts[-1].get("more_body"):
            try:
                left = max(end - time.monotonic(), 0.0)
                parts.append(await asyncio.wait_for(receive(), left))
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not come within {seconds:g} s", closes=True
                ) from None
        parts.reverse()

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        return again


class KnownNames:
    """By which names a server may be asked, and by whose pages.

    A web page can have a browser ask a server that only the browser's machine reaches: by a name of
    the page's own that leads there (DNS rebinding), or from its own origin. The first shows in
    ``Host``, the second in ``Origin``. Starlette's middleware says which names match; its answer is
    plain text, so it is not what answers here.
    """

    def __init__(self, config: ServeConfig):
        mine = ["localhost", "127.0.0.1", "[::1]", _in_brackets(config.host)]
        self._hosts = TrustedHostMiddleware(_known, [*mine, *config.allowed_hosts], False)
        # Another port of this machine is another's page.
        self._origins = TrustedHostMiddleware(_known, config.allowed_hosts, False)

    async def check(self, scope: Scope) -> None:
        """Raise an :class:`ApiError` if the request came by another name or from another's page."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not await _matches(self._hosts, host):
            raise ApiError(
                421,
                f"this server does not answer to the name '{shown(host)}': its owner can add it to "
                "serve.allowed_hosts",
            )
        if origin is None or scope["method"] not in _WITH_BODY:
            return
        page = origin.partition("://")[2].lower()
        if page != host.lower() and not await _matches(self._origins, page):
            raise ApiError(
                403,
                f"this server takes nothing from pages of '{shown(origin)}': its owner can add "
                "their host to serve.allowed_hosts",
            )


async def _matches(names: TrustedHostMiddleware, host: str) -> bool:
    scope: Scope = {"type": "http", "headers": [(b"host", host.encode("latin-1"))]}
    await names(scope, _nothing, _nowhere)
    return "known" in scope


async def _known(scope: Scope, receive: Receive, send: Send) -> None:
    scope["known"] = True


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _nowhere(message: Message) -> None:
    return


def _in_brackets(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _checks_names(config: ServeConfig) -> bool:
    """Whether ``Host`` and ``Origin`` matter: where no key does their work, or if it is wished."""
    return bool(config.allowed_hosts) or not (config.api_keys_file or config.allow_public)


def _from_here(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])
