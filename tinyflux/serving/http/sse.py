"""Server-sent events, as the HTML standard writes them."""

import json
from typing import Any

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


def server_sent(event: str, data: dict[str, Any]) -> bytes:
    """One event; JSON has no line breaks, so its data is one line."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
