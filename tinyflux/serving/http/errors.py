"""Errors as OpenAI's API has them: a status, and one sentence in ``error.message``."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tinyflux.errors import InputError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_SHOWN = 60  # characters
_SENTENCES = {404: "there is nothing at this address", 405: "this address has no such method"}


_MEANINGS = {
    400: "not JSON, or out of bounds",
    401: "no key, or a wrong one",
    403: "not from this machine, this page or without keys",
    404: "no such model or picture",
    408: "the body did not come in time",
    411: "no Content-Length",
    413: "the body is too long",
    421: "asked by a name that is not the server's",
    422: "a field is missing, unknown or of the wrong kind",
    429: "no room; `Retry-After` says when to try again",
    500: "the server failed at this request",
    503: "not drawn in time, or no replica that works",
}


class Problem(BaseModel):
    """What went wrong: ``message`` is one sentence, and ``param`` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Problem


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For an address's page at ``/docs``: the errors it may answer."""
    return {each: {"model": ErrorBody, "description": _MEANINGS[each]} for each in statuses}


# Of every address, and of one that takes a body.
ERRORS = errors_of(401, 403, 421, 422, 500)
BODY_ERRORS = errors_of(400, 408, 411, 413)


class ApiError(Exception):
    """A request that gets no picture.

    Attributes:
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


def shown(text: str) -> str:
    """What a client sent, as an error repeats it: its beginning."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _invalid(error: RequestValidationError) -> ApiError:
    first: Mapping[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    place = shown(".".join(str(part) for part in first["loc"] if part != "body"))
    if first["type"] == "extra_forbidden":
        what = "is not a known field"
    elif first["type"] == "missing":
        what = "is missing"
    elif first["type"] == "value_error":
        what = str(first["ctx"]["error"])
    else:
        what = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(422, f"{place or 'the body'}: {what}", place or None)


def answer_mistakes(api: FastAPI) -> None:
    """Make ``api`` answer every mistake with one sentence."""

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.answer()

    @api.exception_handler(InputError)
    async def mistaken(request: Request, error: InputError) -> JSONResponse:
        return ApiError(400, str(error)).answer()

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).answer()

    @api.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        sentence = _SENTENCES.get(error.status_code, str(error.detail))
        answer = ApiError(error.status_code, sentence).answer()
        if allowed := (error.headers or {}).get("Allow"):
            answer.headers["Allow"] = allowed.replace("GET", "GET, HEAD")
        return answer

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed at this request; its log says how").answer()
