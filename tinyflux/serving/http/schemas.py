"""What the fields of both APIs may hold."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

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


def _number(value: Any) -> Any:
    """Pydantic takes ``true`` and ``"2"`` for numbers; the schema that clients read does not."""
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


Text = Annotated[str, AfterValidator(_whole_characters)]
Count = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(_number)]
Interval = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_number)]
Guidance = Annotated[float, Field(ge=0, le=100), BeforeValidator(_number)]
Partial = Annotated[int, Field(ge=0, le=3), BeforeValidator(_number)]
