"""What the replica of an engine tells the HTTP side about one picture.

An engine's own events are :mod:`tinyflux.inference.events`; between processes, a picture is first
accepted or refused.
"""

from dataclasses import dataclass

from tinyflux.inference.events import Drawn, Step


@dataclass(frozen=True)
class Accepted:
    """The picture will be drawn; nothing before it is an answer yet."""


@dataclass(frozen=True)
class Refused:
    """Instead of :class:`Accepted`, or after it when drawing fails: an HTTP status and a sentence.

    Attributes:
        retry_after: seconds after which another try may do better.
    """

    status: int
    message: str
    retry_after: float | None = None


Event = Accepted | Refused | Step | Drawn
