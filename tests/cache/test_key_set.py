"""The set of keys that a build's driver keeps."""

import hashlib
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tinyflux.cache import key_set
from tinyflux.cache.key_set import KeySet

# Half of them begin as another does.
KEYS = [hashlib.sha256(bytes([n])).hexdigest()[:32] for n in range(40)]
KEYS += [key[:16] + other[:16] for key, other in zip(KEYS, reversed(KEYS), strict=True)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=30), max_size=12))
def test_a_key_is_known_from_its_second_time_on(batches):
    keys, known = KeySet(), set()
    for batch in batches:
        expected = []
        for key in batch:
            expected.append(key in known)
            known.add(key)
        assert keys.add(batch) == expected


def test_runs_that_are_not_merged_are_searched_too(monkeypatch):
    monkeypatch.setattr(key_set, "LARGEST_RUN", 64)
    numbers = random.Random(0)
    every = [f"{numbers.getrandbits(128):032x}" for _ in range(1000)]
    keys = KeySet()
    for at in range(0, 1000, 10):
        assert not any(keys.add(every[at : at + 10]))
    assert all(keys.add(every))
