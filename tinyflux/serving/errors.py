"""The one error of serving, from the engine's replica to the answer: OpenAI's, with its status."""

from math import ceil
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no picture.

    It is raised, or is what the replica of an engine yields instead of a picture, and goes from
    process to process as it is.

    Attributes:
        status: HTTP's.
        message: one sentence.
        param: the field at fault.
        code: OpenAI's word for the mistake.
        retry_after: seconds after which another try may do better.
        closes: whether the connection ends with the answer: its body was not read to the end, so
            there is no place for a next request.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        closes: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.closes = retry_after, closes

    def __reduce__(self) -> tuple[type["ApiError"], tuple[Any, ...]]:
        # An exception is pickled by its ``args``: here the message alone, which ``str`` shows.
        values = (self.status, self.message, self.param, self.code, self.retry_after, self.closes)
        return ApiError, values

    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": encodable(self.message),
                "type": _TYPES.get(self.status, kind),
                "param": None if self.param is None else encodable(self.param),
                "code": self.code,
            }
        }

    def answer(self) -> JSONResponse:
        """The whole answer, with ``Retry-After`` where it is known."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.closes:
            headers["Connection"] = "close"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def encodable(text: str) -> str:
    """``text`` with ``?`` for what cannot be written as UTF-8."""
    return text.encode(errors="replace").decode()
