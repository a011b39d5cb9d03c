"""What each address says of its errors, and every mistake answered as an :class:`ApiError`."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tinyflux.errors import InputError
from tinyflux.serving.errors import ApiError

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
