"""Pictures that are to be fetched by name."""

import secrets
import time
from collections import OrderedDict


class ImageStore:
    """Pictures in memory, under names that cannot be guessed.

    Args:
        most: pictures kept; beyond that the oldest go.
        seconds: how long each is kept.
    """

    def __init__(self, most: int, seconds: float):
        self._most, self._seconds = most, seconds
        self._pngs: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def keep(self, png: bytes) -> str:
        """Keep a picture; its name."""
        self._forget()
        name = secrets.token_urlsafe(24)
        self._pngs[name] = (time.monotonic(), png)
        while len(self._pngs) > self._most:
            self._pngs.popitem(last=False)
        return name

    def kept(self, name: str) -> bytes | None:
        """The picture of that name, if it is still kept."""
        self._forget()
        return self._pngs.get(name, (0.0, None))[1]

    def _forget(self) -> None:
        since = time.monotonic() - self._seconds
        while self._pngs and next(iter(self._pngs.values()))[0] < since:
            self._pngs.popitem(last=False)
