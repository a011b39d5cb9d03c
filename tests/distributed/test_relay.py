"""A user's error arrives as it was raised, and without the tracebacks of the processes between."""

import json
from dataclasses import dataclass

import pytest

from tinyflux.distributed.relay import answer, pack_error, unpack_error, value_of
from tinyflux.errors import (
    CacheError,
    CheckpointError,
    DamagedCheckpointError,
    StorageError,
    TinyFluxError,
)


@dataclass
class Made:
    count: int
    names: tuple[str, ...]


def row_of(work, *arguments):
    """The one row that Ray Data hands back of a worker's answer."""
    return {name: column[0] for name, column in answer(work, *arguments).items()}


@pytest.mark.parametrize("kind", [TinyFluxError, CheckpointError, DamagedCheckpointError])
def test_an_error_is_of_its_kind_and_says_what_it_said(kind):
    error = unpack_error(pack_error(kind("the 'file' is\nbroken: mend it")).encode())
    assert type(error) is kind
    assert str(error) == "the 'file' is\nbroken: mend it"


def test_an_error_that_only_another_version_knows_is_still_a_users():
    record = {"kind": "LaterError", "message": "what it says"}
    assert type(unpack_error(json.dumps(record))) is TinyFluxError


def test_an_answer_gives_what_was_made_or_raises():
    assert value_of(row_of(lambda: Made(2, ("a", "b")), "")) == {"count": 2, "names": ["a", "b"]}
    assert value_of(row_of(lambda: None, "")) is None

    def raises(error):
        raise error

    with pytest.raises(StorageError, match=r"^unreachable$"):
        value_of(row_of(lambda: raises(StorageError("unreachable")), ""))
    full = OSError(28, "No space left on device")
    with pytest.raises(CacheError, match=r"^the cache cannot be written: .*No space left"):
        value_of(row_of(lambda: raises(full), "the cache cannot be written", CacheError))
    # What no user can mend keeps its traceback.
    with pytest.raises(ZeroDivisionError):
        answer(lambda: 1 // 0, "")
