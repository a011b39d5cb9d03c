"""The error that goes from a replica to the answer."""

import json
import pickle

from tinyflux.serving.errors import ApiError


def test_an_error_is_the_same_in_another_process():
    error = ApiError(429, "no room", "n", "overloaded", retry_after=1.5, closes=True)
    there = pickle.loads(pickle.dumps(error))
    assert str(there) == "no room"
    assert vars(there) == vars(error)
    assert json.loads(there.answer().body) == error.body()
    assert there.answer().headers["Retry-After"] == "2"
