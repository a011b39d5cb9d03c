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


def size_reason(source: str, size: int) -> str:
    """Why a file of ``size`` bytes is not even read; empty if it may be."""
    if size <= MAX_FILE_BYTES:
        return ""
    return f"'{source}' has {size} bytes, more than the {MAX_FILE_BYTES} of any sound picture"


def clean_captions(texts: object, where: str) -> tuple[tuple[str, ...], str]:
    """A text or a list of texts, without needless spaces and without empty ones.

    Returns:
        The captions, or none and the reason.
    """
    listed = texts if isinstance(texts, list | tuple) else [texts]
    found = []
    for text in listed:
        if text is None:
            continue
        if not isinstance(text, str):
            return (), f"the caption {where} is of type {type(text).__name__}, not text"
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            return (), f"the caption {where} holds characters that are not Unicode"
        found.append(" ".join(text.split()))
    captions = tuple(dict.fromkeys(filter(None, found)))
    if not captions:
        return (), f"the caption {where} is empty: write one, or take the picture out"
    return captions, ""


def text_captions(content: bytes, where: str, per_line: bool) -> tuple[tuple[str, ...], str]:
    """:func:`clean_captions` of a text file: one, or one per line."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (), f"the caption {where} is not UTF-8 text: {error}"
    return clean_captions(text.splitlines() if per_line else text, where)
