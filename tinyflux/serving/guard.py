"""What every request passes first: size, key, and what browsers are told."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyflux.serving.engine import ServeConfig
from tinyflux.serving.keys import Keys, is_loopback
from tinyflux.serving.metrics import RequestMetrics
from tinyflux.serving.refusals import ApiError

# Open to everyone: no pictures are drawn there, and a kept picture's name is its own secret.
_OPEN = ("/page/", "/static-offline-docs/", "/v1/images/files/")
_OPEN_EXACTLY = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class Guard:
    """ASGI middleware that refuses before a body is read."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys):
        self._app, self._config, self._keys = app, config, keys
        self._metrics = RequestMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                self._metrics.count(scope, message["status"])
            await send(message)

        refusal = self._refusal(scope)
        app = self._app if refusal is None else refusal.answer()
        await app(scope, receive, told)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        is_open = path in _OPEN_EXACTLY or path.startswith(_OPEN)
        if self._keys:
            if not is_open and not self._keys.admit(headers.get("authorization", "")):
                return ApiError(
                    401,
                    "this server needs an API key: send the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                )
        elif not self._config.allow_public and not _from_here(scope):
            # `serve deploy` chooses the host without asking this config.
            return ApiError(
                403,
                "this server answers its own machine only: its owner can set serve.api_keys_file",
            )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            limit, length = self._config.max_body_bytes, headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                return ApiError(411, "a request must say its Content-Length")
            if int(length) > limit:
                return ApiError(413, f"the body has {length} bytes, the limit is {limit}")
        return None


def _from_here(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])
