"""A picture as its source has it."""

from dataclasses import dataclass

# A picture file beyond this is a mistake or an attack.
MAX_FILE_BYTES = 2**28


@dataclass(frozen=True)
class RawPicture:
    """A captioned picture, not decoded.

    Attributes:
        source: where it is, for people.
        locator: where it is, for ``open_pictures``.
        content: the picture file.
        captions: at least one, unless there is a ``reason``.
        mask_locator, mask: its foreground's, if any.
        reason: why it cannot be used; empty where nothing is wrong so far.
    """

    source: str
    locator: str = ""
    content: bytes = b""
    captions: tuple[str, ...] = ()
    mask_locator: str = ""
    mask: bytes | None = None
    reason: str = ""


def clean_captions(texts: object) -> tuple[str, ...]:
    """A text or a list of texts without needless spaces and without empty ones."""
    found = texts if isinstance(texts, list | tuple) else [texts]
    squeezed = (" ".join(text.split()) for text in found if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in squeezed if text))
