"""What an application's processes share, in one actor: a process for each would cost memory."""

from typing import Any

from tinyflux.serving.config import ServeConfig
from tinyflux.serving.image_store import ImageStore
from tinyflux.serving.registry import ReplicaRegistry


class SharedState:
    """The image store and the registry of replicas, as a deployment of one replica."""

    def __init__(self, config: ServeConfig):
        self._images = ImageStore(config.keep_pictures, config.keep_seconds)
        self._registry = ReplicaRegistry()

    async def keep(self, png: bytes) -> str:
        """See :meth:`ImageStore.keep`."""
        return self._images.keep(png)

    async def kept(self, name: str) -> bytes | None:
        """See :meth:`ImageStore.kept`."""
        return self._images.kept(name)

    async def call_reload(self, model: str) -> None:
        """See :meth:`ReplicaRegistry.call_reload`."""
        self._registry.call_reload(model)

    async def report(self, model: str, replica: str, figures: dict[str, Any]) -> str | None:
        """See :meth:`ReplicaRegistry.report`."""
        return self._registry.report(model, replica, figures)

    async def present(self) -> list[dict[str, Any]]:
        """See :meth:`ReplicaRegistry.present`."""
        return self._registry.present()
