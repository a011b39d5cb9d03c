"""The whole HTTP side as one ASGI application."""

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

import tinyflux
from tinyflux.serving.client import EngineClient
from tinyflux.serving.http.auth import read_keys
from tinyflux.serving.http.errors import ERRORS, answer_mistakes
from tinyflux.serving.http.middleware import RequestGuard
from tinyflux.serving.http.native import router as native_router
from tinyflux.serving.http.openai import router as openai_router
from tinyflux.serving.http.page import page_routes


def make_api(client: EngineClient) -> FastAPI:
    """Routes, errors and limits around ``client``; ``/docs`` needs nothing from elsewhere."""
    api = FastAPIOffline(
        title="TinyFlux",
        description="Pictures from prompts.",
        version=tinyflux.__version__,
        redoc_url=None,
    )
    api.state.client = client
    answer_mistakes(api)
    api.add_middleware(
        RequestGuard, config=client.config, keys=read_keys(client.config.api_keys_file)
    )
    # Only told here, for the pages at /docs; the guard is what checks.
    bearer = [Security(HTTPBearer(auto_error=False))] if client.config.api_keys_file else []
    api.include_router(openai_router, dependencies=bearer, responses=ERRORS)
    api.include_router(native_router, dependencies=bearer, responses=ERRORS)
    api.include_router(page_routes())
    return api
