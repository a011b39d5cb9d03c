"""TinyFlux's own API: every option of the sampler, previews, health and reloading."""

import base64
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tinyflux.inference.events import Drawn, Step
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.client import EngineClient
from tinyflux.serving.errors import ApiError
from tinyflux.serving.events import Event
from tinyflux.serving.http.auth import KEYLESS
from tinyflux.serving.http.dependencies import Client
from tinyflux.serving.http.errors import BODY_ERRORS, errors_of
from tinyflux.serving.http.schemas import Count, Guidance, Interval, Seed, Solver, Text
from tinyflux.serving.http.sse import SSE_HEADERS, server_sent
from tinyflux.serving.http.truncation import DOCUMENTED, truncation_fields, truncation_headers

_SIDE = "pixels: a multiple of `limits.step` of GET /info, up to its `max_height` or `max_width`"


class GenerateBody(BaseModel):
    """``POST /generate``.

    Sizes are in pixels; what is left out is the server's default, and a seed is drawn.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(min_length=1)
    negative_prompt: Text = ""
    model: Text | None = Field(default=None, description="from GET /v1/models")
    num_steps: Count | None = None
    guidance_scale: Guidance | None = None
    height: Count | None = Field(default=None, description=_SIDE)
    width: Count | None = Field(default=None, description=_SIDE)
    seed: Seed | None = None
    solver: Solver = "euler"
    adapter: Text | None = Field(default=None, description="of `adapters` of GET /info")
    preview_every: Interval = Field(default=0, description="steps between previews; 0 is none")


class ReloadBody(BaseModel):
    """``POST /admin/reload``."""

    model_config = ConfigDict(extra="forbid")

    model: Text | None = Field(default=None, description="from GET /v1/models")


router = APIRouter(tags=["TinyFlux"])
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}, "text/event-stream": {}}, "headers": DOCUMENTED}
}


@router.post(
    "/generate",
    response_class=Response,
    responses={**_PICTURE, **BODY_ERRORS, **errors_of(404, 429, 503)},
)
async def generate(body: GenerateBody, http: Request, client: Client) -> Response:
    """Draw one picture.

    The answer is a PNG, its seed in the header `X-Seed`. With `Accept: text/event-stream` it
    is events: `accepted`, `step` (with a `preview` every `preview_every` steps) and `finished`
    (with `prompt_truncated` for the header of like name).
    """
    model, request = client.choose(body.model), _request(client, body)
    started = time.monotonic()
    if "text/event-stream" in http.headers.get("accept", ""):
        events = client.draw(model, request, every_step=True)
        await anext(events)  # accepted; refusals are answers with a status of their own
        return StreamingResponse(_stream(events, request, started), headers=SSE_HEADERS)
    drawn = await client.picture(model, request)
    headers = {
        "X-Seed": str(request.seed),
        "X-Seconds": f"{time.monotonic() - started:.3f}",
        **truncation_headers(drawn),
    }
    return Response(drawn.png, media_type="image/png", headers=headers)


@router.get("/info", responses=errors_of(404))
async def info(client: Client, model: Text | None = None) -> dict[str, Any]:
    """What can be asked for: models, solvers, limits and defaults."""
    chosen, config = client.choose(model), client.config
    return {
        "model": chosen,
        "models": client.models,
        "solvers": list(get_args(Solver)),
        "limits": {
            **(await client.limits(chosen))._asdict(),
            "max_steps": config.max_steps,
            "max_n": config.max_n,
            "max_prompt_chars": config.max_prompt_chars,
        },
        "adapters": list(config.adapters),
        "defaults": {
            "size": config.default_size,
            "steps": config.default_steps,
            "guidance": config.default_guidance,
        },
    }


@router.get("/healthz", openapi_extra=KEYLESS)
async def healthz() -> dict[str, str]:
    """Whether the server is alive."""
    return {"status": "ok"}


@router.get("/readyz", responses=errors_of(503), openapi_extra=KEYLESS)
async def readyz(client: Client) -> dict[str, str]:
    """Whether every model can draw now."""
    for model in client.models:
        if not await client.ready(model):
            raise ApiError(503, f"the model '{model}' is not ready", retry_after=1)
    return {"status": "ready"}


@router.get("/admin/replicas")
async def replicas(client: Client) -> dict[str, Any]:
    """What every replica says of itself: its batch, its queue, its reloads."""
    return {"replicas": await client.replicas()}


@router.post("/admin/reload", status_code=202, responses={**BODY_ERRORS, **errors_of(404)})
async def reload(body: ReloadBody, client: Client) -> dict[str, str]:
    """Have every replica of a model read its checkpoint again; requests go on meanwhile.

    Needs a server with API keys. `GET /admin/replicas` counts reloads as they are done.
    """
    if client.config.api_keys_file is None:
        raise ApiError(
            403, "reloading needs a server with API keys: its owner sets serve.api_keys_file"
        )
    model = client.choose(body.model)
    await client.reload(model)
    return {"model": model, "status": "reloading"}


def _request(client: EngineClient, body: GenerateBody) -> SampleRequest:
    config = client.config
    values = body.model_dump(exclude={"model"}, exclude_none=True)
    return SampleRequest(
        **{
            "num_steps": config.default_steps,
            "guidance_scale": config.default_guidance,
            "height": config.default_size,
            "width": config.default_size,
            "seed": random.randrange(2**31),
            **values,
        }
    )


async def _stream(
    events: AsyncGenerator[Event, None], request: SampleRequest, started: float
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield server_sent("accepted", {"seed": request.seed})
        try:
            async for event in events:
                if isinstance(event, Step):
                    preview = event.preview and base64.b64encode(event.preview).decode()
                    told = {"step": event.step, "total": event.total, "preview": preview}
                    yield server_sent("step", told)
                elif isinstance(event, Drawn):
                    seconds = round(time.monotonic() - started, 3)
                    image = base64.b64encode(event.png).decode()
                    last = {"seed": request.seed, "seconds": seconds, "image": image}
                    yield server_sent("finished", {**last, **truncation_fields(event)})
        except ApiError as error:
            yield server_sent("error", error.body())
