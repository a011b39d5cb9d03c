"""What routes are given of the application that they are part of."""

from typing import Annotated, cast

from fastapi import Depends, Request

from tinyflux.serving.client import EngineClient


async def engine_client(request: Request) -> EngineClient:
    """The way to the engines, from the application's state."""
    return cast(EngineClient, request.app.state.client)


Client = Annotated[EngineClient, Depends(engine_client)]
