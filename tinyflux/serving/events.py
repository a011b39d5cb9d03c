"""What the replica of an engine tells the HTTP side about one picture, in this order."""

from dataclasses import dataclass

from tinyflux.model.text import READ_WHOLE, CutTokens


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


@dataclass(frozen=True)
class Step:
    """``step`` of ``total`` is done; ``preview`` is a PNG of the guess so far, where one is due."""

    step: int
    total: int
    preview: bytes | None


@dataclass(frozen=True)
class Drawn:
    """The picture as PNG.

    Attributes:
        cut, negative_cut: how much of the prompt and of the negative prompt was not read.
    """

    png: bytes
    cut: CutTokens = READ_WHOLE
    negative_cut: CutTokens = READ_WHOLE


Event = Accepted | Refused | Step | Drawn
