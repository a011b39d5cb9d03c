"""What an engine tells of a picture on its way, up to :class:`Drawn`."""

from dataclasses import dataclass

from tinyflux.model.text import READ_WHOLE, CutTokens


@dataclass(frozen=True)
class Step:
    """``step`` of ``total`` is done.

    Attributes:
        preview: a PNG of what the picture would be if the last velocity held on, when one is due.
    """

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
