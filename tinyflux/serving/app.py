"""The HTTP server: Ray Serve around :class:`ImageEngine`."""

import asyncio
import logging
import os
import random
import signal
import threading
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from tinyflux.distributed.ray_session import ensure_ray
from tinyflux.errors import InputError, TinyFluxError
from tinyflux.model.zoo import ZooConfig
from tinyflux.serving.engine import ImageEngine, ImageRequest, ServeConfig
from tinyflux.util.config import from_dict, to_dict

APP_NAME = "tinyflux"
MAX_SEED = 2**53 - 1  # what JSON numbers hold exactly


class GenerateBody(BaseModel):
    """``POST /generate``. Sizes are in pixels; a seed left out is drawn and told in the answer."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    negative_prompt: str = ""
    num_steps: int = Field(default=28, ge=1)
    guidance_scale: float = Field(default=5.0, ge=0, le=100)
    height: int = Field(default=512, ge=1)
    width: int = Field(default=512, ge=1)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error in the shape of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status_code=status)


def _api(max_body_bytes: int) -> FastAPI:
    """An app without routes that answers every mistake with one sentence."""
    api = FastAPI(title="TinyFlux", description="Pictures from prompts.")

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, "the body is not valid JSON")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        what = "is not a known field" if first["type"] == "extra_forbidden" else first["msg"]
        return _error(422, f"{place or 'the body'}: {what}", place or None)

    @api.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> JSONResponse:
        return _error(400, str(error))

    @api.middleware("http")
    async def bounded(request: Request, call_next: Any) -> Response:
        if request.method in ("POST", "PUT", "PATCH"):
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                return _error(411, "a request must say its Content-Length")
            if int(length) > max_body_bytes:
                return _error(413, f"the body has {length} bytes, the limit is {max_body_bytes}")
        return await call_next(request)

    return api


def build_app(config: ServeConfig, zoo: ZooConfig) -> serve.Application:
    """The Ray Serve application; every replica loads the checkpoint once."""
    api = _api(config.max_body_bytes)

    @serve.deployment(
        name="images",
        num_replicas=config.num_replicas,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
    )
    @serve.ingress(api)
    class Images:
        def __init__(self, settings: dict[str, Any]):
            self._engine = ImageEngine(
                from_dict(ServeConfig, settings["serve"], "serve"),
                from_dict(ZooConfig, settings["zoo"], "zoo"),
            )

        @api.post("/generate", response_class=Response)
        async def generate(self, body: GenerateBody) -> Response:
            """Draw one picture; the answer is a PNG, its seed in the header ``X-Seed``."""
            seed = random.randrange(2**31) if body.seed is None else body.seed
            request = ImageRequest(**{**body.model_dump(), "seed": seed})
            started = time.monotonic()
            # In a thread, so that health checks are answered meanwhile.
            png = await asyncio.to_thread(self._engine.generate, request)
            headers = {"X-Seed": str(seed), "X-Seconds": f"{time.monotonic() - started:.3f}"}
            return Response(png, media_type="image/png", headers=headers)

        @api.get("/healthz")
        async def healthz(self) -> dict[str, str]:
            """Whether pictures can be drawn."""
            return {"status": "ok"}

        @api.get("/v1/models")
        async def models(self) -> dict[str, Any]:
            """The models that are served."""
            return {"object": "list", "data": [{"id": APP_NAME, "object": "model"}]}

    return Images.bind({"serve": to_dict(config), "zoo": to_dict(zoo)})  # type: ignore[attr-defined]


def run_server(config: ServeConfig, zoo: ZooConfig) -> None:
    """Serve until interrupted or terminated.

    Raises:
        TinyFluxError: the checkpoint or the models cannot be opened, or the port is taken.
    """
    import ray

    ImageEngine(config, zoo)  # a mistake is told here, not by a replica that restarts for ever
    # Ray Serve's five seconds are too few for a machine that is also training.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    ensure_ray()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(build_app(config, zoo), name=APP_NAME, route_prefix="/")
        address = f"http://{config.host}:{config.port}"
        print(f"serving {config.checkpoint} at {address} (docs at {address}/docs)", flush=True)
        stop.wait()
        print("serving ends", flush=True)
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise TinyFluxError(f"the server could not start: {reason}") from error
    finally:
        serve.shutdown()
        ray.shutdown()
