"""OpenAI's Images API, as far as a text-to-image model can answer it."""

import asyncio
import base64
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from math import ceil
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from tinyflux.inference.events import Drawn, Step
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.client import EngineClient
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.errors import ApiError
from tinyflux.serving.events import Event
from tinyflux.serving.http.auth import KEYLESS
from tinyflux.serving.http.dependencies import Client
from tinyflux.serving.http.errors import BODY_ERRORS, errors_of
from tinyflux.serving.http.schemas import Count, Guidance, Partial, Seed, Solver, Text
from tinyflux.serving.http.sse import SSE_HEADERS, server_sent
from tinyflux.serving.http.truncation import DOCUMENTED, truncation_fields, truncation_headers
from tinyflux.util.picture_size import SIDES


class ImagesBody(BaseModel):
    """``POST /v1/images/generations``.

    The last six fields are TinyFlux's own: `extra_body` of OpenAI's clients. `quality`,
    `background`, `moderation`, `output_format` and `user` are taken for clients that send them and
    change nothing.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(min_length=1)
    model: Text | None = Field(default=None, description="from GET /v1/models")
    n: Count | None = Field(default=None, description="pictures; the i-th has seed + i")
    size: Text | None = Field(
        default=None,
        description="WIDTHxHEIGHT in pixels, as GET /info allows, or auto",
        # Only told here: another text is answered as a size that cannot be drawn is.
        json_schema_extra={"pattern": f"^(auto|{SIDES.pattern})$"},
    )
    response_format: Literal["b64_json", "url"] | None = None
    stream: StrictBool | None = None
    partial_images: Partial | None = None
    user: Text | None = Field(default=None, max_length=1000)
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png"] | None = None
    negative_prompt: Text = ""
    seed: Seed | None = None
    steps: Count | None = None
    guidance: Guidance | None = None
    solver: Solver = "euler"
    adapter: Text | None = Field(default=None, description="of `adapters` of GET /info")


router = APIRouter(prefix="/v1", tags=["OpenAI"])
_PICTURES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "headers": DOCUMENTED}
}


@router.get("/models")
async def models(client: Client) -> dict[str, Any]:
    """The models that are served; the first is the default."""
    return {"object": "list", "data": [_listed(client, model) for model in client.models]}


@router.get("/models/{model}", responses=errors_of(404))
async def model(model: Text, client: Client) -> dict[str, Any]:
    """One of the models that are served."""
    return _listed(client, client.choose(model))


@router.post(
    "/images/generations",
    response_model=None,
    responses={**_PICTURES, **BODY_ERRORS, **errors_of(404, 429, 503)},
)
async def generations(
    body: ImagesBody, http: Request, answer: Response, client: Client
) -> dict[str, Any] | Response:
    """Draw pictures; with `stream`, server-sent events with partial pictures."""
    model = client.choose(body.model)
    _check_body(body, client.config)
    requests = _requests(client, body)
    size = f"{requests[0].width}x{requests[0].height}"
    if body.stream:
        events = client.draw(model, requests[0])
        await anext(events)  # accepted; refusals are answers with a status of their own
        stream = _stream(events, body.partial_images or 0, size)
        return StreamingResponse(stream, headers=SSE_HEADERS)
    pictures = await _all([client.picture(model, request) for request in requests])
    answer.headers.update(truncation_headers(pictures[0]))
    data: list[dict[str, Any]] = []
    for request, drawn in zip(requests, pictures, strict=True):
        if body.response_format == "url":
            name = await client.keep(drawn.png)
            image = {"url": f"{http.base_url}v1/images/files/{name}.png"}
        else:
            image = {"b64_json": base64.b64encode(drawn.png).decode()}
        data.append({**image, "seed": request.seed})
    return {"created": _now(), "data": data, "size": size, "output_format": "png"}


@router.get(
    "/images/files/{name}.png",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **errors_of(404)},
    openapi_extra=KEYLESS,
)
async def file(name: Text, client: Client) -> Response:
    """A picture that was asked for as `url`, for as long as it is kept."""
    png = await client.kept(name)
    if png is None:
        raise ApiError(404, "this picture is not kept any more, or never was")
    return Response(png, media_type="image/png", headers={"Cache-Control": "private"})


def _listed(client: EngineClient, model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": client.started, "owned_by": "tinyflux"}


def _check_body(body: ImagesBody, config: ServeConfig) -> None:
    """Refuse what each field allows and all of them together do not.

    Raises:
        ApiError: 400, it names the field.
    """
    count = body.n or 1
    if count > config.max_n:
        raise ApiError(400, f"n must be from 1 to {config.max_n}, not {count}", "n")
    if body.stream and count > 1:
        raise ApiError(400, "a stream is of one picture: leave out n", "n")
    if body.stream and body.response_format == "url":
        raise ApiError(400, "a stream has b64_json pictures only", "response_format")
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images needs stream: true", "partial_images")


def _requests(client: EngineClient, body: ImagesBody) -> list[SampleRequest]:
    """One request for each picture: the i-th has ``seed + i``."""
    config = client.config
    width, height = _size(body.size, config.default_size)
    steps = config.default_steps if body.steps is None else body.steps
    partial = body.partial_images or 0
    seed = random.randrange(2**31) if body.seed is None else body.seed
    return [
        SampleRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            num_steps=steps,
            guidance_scale=config.default_guidance if body.guidance is None else body.guidance,
            height=height,
            width=width,
            seed=seed + index,
            solver=body.solver,
            adapter=body.adapter,
            preview_every=ceil(steps / (partial + 1)) if body.stream and partial else 0,
        )
        for index in range(body.n or 1)
    ]


def _size(size: str | None, default: int) -> tuple[int, int]:
    """Width and height in pixels; a size that cannot be drawn is the engine's to refuse."""
    if size in (None, "auto"):
        return default, default
    match = SIDES.fullmatch(size)
    if match is None:
        raise ApiError(400, f"size must be 'auto' or such as '512x512', not '{size:.40}'", "size")
    return int(match[1]), int(match[2])


async def _all(coming: Sequence[Awaitable[Drawn]]) -> list[Drawn]:
    """All of them, or the first error with the others cancelled."""
    tasks = [asyncio.ensure_future(picture) for picture in coming]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _stream(
    events: AsyncGenerator[Event, None], partial: int, size: str
) -> AsyncGenerator[bytes, None]:
    """The rest of ``events`` as OpenAI names them, with at most ``partial`` previews."""
    common = {"size": size, "output_format": "png", "quality": "auto", "background": "opaque"}
    sent = 0
    async with aclosing(events):
        try:
            async for event in events:
                if isinstance(event, Drawn):
                    kind, png = "image_generation.completed", event.png
                    more: dict[str, Any] = {"usage": _NO_TOKENS, **truncation_fields(event)}
                elif isinstance(event, Step) and event.preview is not None and sent < partial:
                    kind, png = "image_generation.partial_image", event.preview
                    more = {"partial_image_index": sent}
                    sent += 1
                else:
                    continue
                picture = {"b64_json": base64.b64encode(png).decode(), "created_at": _now()}
                yield server_sent(kind, {"type": kind, **picture, **more, **common})
        except ApiError as error:
            yield server_sent("error", error.body())


# Pictures are not billed here; OpenAI's clients expect the field.
_NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _now() -> int:
    return int(time.time())
