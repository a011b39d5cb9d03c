"""What the fields of both APIs may hold."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

MAX_SEED = 2**53 - 1  # what JSON numbers hold exactly
MOST = 2**31 - 1  # steps, pixels or pictures, whatever the server's own limits are

Solver = Literal["euler", "heun", "multistep"]


def _whole_characters(text: str) -> str:
    """JSON can say half of a surrogate pair, which no encoding, tokenizer or replica takes."""
    if not is_encodable(text):
        raise ValueError("has half of a surrogate pair, which is no character: leave it out")
    return text


def is_encodable(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Text = Annotated[str, AfterValidator(_whole_characters)]
Count = Annotated[int, Field(ge=1, le=MOST)]
