"""How an answer says that a prompt was longer than the text encoders read."""

from typing import Any

from tinyflux.inference.events import Drawn

HEADER, NEGATIVE_HEADER = (
    "X-TinyFlux-Prompt-Truncated",
    "X-TinyFlux-Negative-Prompt-Truncated",
)

# For OpenAPI.
DOCUMENTED: dict[str, Any] = {
    name: {
        "description": f"Only if the {text} is longer than the text encoders read: how many of its "
        "tokens each left out.",
        "schema": {"type": "string", "example": "clip=5, t5=3"},
    }
    for name, text in ((HEADER, "prompt"), (NEGATIVE_HEADER, "negative prompt"))
}


def truncation_headers(drawn: Drawn) -> dict[str, str]:
    """Such as ``X-TinyFlux-Prompt-Truncated: clip=5, t5=3``; none for what was read whole."""
    cuts = {HEADER: drawn.cut, NEGATIVE_HEADER: drawn.negative_cut}
    return {name: f"clip={cut.clip}, t5={cut.t5}" for name, cut in cuts.items() if any(cut)}


def truncation_fields(drawn: Drawn) -> dict[str, dict[str, int]]:
    """The same for an event's data: ``"prompt_truncated": {"clip": 5, "t5": 3}``."""
    cuts = {"prompt_truncated": drawn.cut, "negative_prompt_truncated": drawn.negative_cut}
    return {name: cut._asdict() for name, cut in cuts.items() if any(cut)}
