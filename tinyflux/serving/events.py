"""What the replica of an engine tells the HTTP side about one picture.

An engine's own events are :mod:`tinyflux.inference.events`; between processes, a picture is first
accepted or refused.
"""

from dataclasses import dataclass

from tinyflux.inference.events import Drawn, Step
from tinyflux.serving.errors import ApiError


@dataclass(frozen=True)
class Accepted:
    """The picture will be drawn; nothing before it is an answer yet."""


# An error comes instead of the acceptance, or after it when drawing fails.
Event = Accepted | ApiError | Step | Drawn
