"""The way of a user's error from the process that met it to the one that the user started.

Ray would wrap it in two tracebacks, and start a worker anew that meets it again. So it travels as
data, in a worker's answer or in a file, and is raised as it was at the other end.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tinyflux import errors
from tinyflux.errors import TinyFluxError
from tinyflux.util.config import to_dict


def pack_error(error: TinyFluxError) -> str:
    """The error as JSON."""
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def unpack_error(packed: str | bytes) -> TinyFluxError:
    """The error of :func:`pack_error`, to be raised."""
    record = json.loads(packed)
    kind: type[TinyFluxError] = getattr(errors, record["kind"], TinyFluxError)
    return kind(record["message"])


def answer(
    work: Callable[[], Any], unwritable: str, kind: type[TinyFluxError] = TinyFluxError
) -> dict[str, list[str]]:
    """Do ``work`` in a worker of Ray Data: a batch of one row, with what it gave or a user's error.

    Args:
        unwritable: begins the sentence about a file that cannot be written, an error of ``kind``.
    """
    error: TinyFluxError
    try:
        return {"error": [""], "value": [json.dumps(to_dict(work()))]}
    except TinyFluxError as met:
        error = met
    except OSError as met:
        error = kind(f"{unwritable}: {met}")
    return {"error": [pack_error(error)], "value": [""]}


def value_of(answered: Mapping[str, str]) -> Any:
    """What the work of an :func:`answer` gave, as plain data; raises its error."""
    if answered["error"]:
        raise unpack_error(answered["error"])
    return json.loads(answered["value"])


@contextmanager
def errors_as_raised() -> Iterator[None]:
    """Within it, an error of a task or an actor that is waited for is raised as it was there."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
