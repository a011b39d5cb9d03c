"""The web page at ``/``: plain files, no build step, nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Response

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Everything from this server; pictures are blobs that the page makes itself.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = ("index.html", "style.css", "app.js", "icon.svg")


def page_routes() -> APIRouter:
    """``/`` and ``/page/*``."""
    routes = APIRouter(include_in_schema=False)
    for name in _FILES:
        content = (resources.files(__name__) / name).read_bytes()
        path = "/" if name == "index.html" else f"/page/{name}"
        routes.add_api_route(path, _answer(content, name.rsplit(".", 1)[1]), methods=["GET"])
    return routes


def _answer(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}

    async def answer() -> Response:
        return Response(content, media_type=_TYPES[kind], headers=headers)

    return answer
