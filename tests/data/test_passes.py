"""Which shards each pass reads, and the file that keeps it."""

import json
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.data import ledger as ledger_module
from tinyflux.data.ledger import Ledger
from tinyflux.data.passes import NO_PASSES, Passes
from tinyflux.errors import CacheError
from tinyflux.run_dir import PASSES
from tinyflux.storage.folder import LocalFolder
from tinyflux.util.config import from_dict, to_dict

# How many shards two caches have when each pass begins, and how many positions it takes.
HISTORIES = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=8
)


def told(history):
    """The passes after each of them is decided, their caches never losing a shard."""
    passes, start, found, most = NO_PASSES, 0, [], [0, 0]
    for number, (one, other, length) in enumerate(history):
        most = [max(pair) for pair in zip(most, (one, other), strict=True)]
        # The order in which a cache lists its shards does not matter to those that are known.
        listed = [[f"{name}{n}" for n in reversed(range(count))]
                  for name, count in zip("ab", most, strict=True)]  # fmt: skip
        passes = passes.grown(start, listed, finished=number + 1 == len(history))
        found.append((start, most, passes))
        start += length
    return found


@given(history=HISTORIES)
def test_lists_only_grow_and_each_pass_reads_what_was_there_when_it_began(history):
    found = told(history)
    last = found[-1][2]
    assert last.is_sound()
    for number, (start, counts, passes) in enumerate(found):
        assert passes.has(number)
        assert passes.has(number + 1) == passes.finished == (number + 1 == len(found))
        for known in (passes, last):  # as it was decided it stays
            span = known.span_of(number)
            assert span == known.span_at(start)
            assert span.start <= start
            names = known.names(span)
            assert [sorted(one) for one in names] == [
                [f"{name}{n}" for n in range(count)]
                for name, count in zip("ab", counts, strict=True)
            ]


@given(history=HISTORIES)
def test_later_passes_continue_earlier_ones_and_no_others(history):
    found = [NO_PASSES, *(passes for _, _, passes in told(history))]
    for early, one in enumerate(found):
        for late, other in enumerate(found):
            assert other.continues(one) == (late >= early)
    last = replace(found[-1], finished=False)
    end = last.spans[-1]
    moved = replace(last, spans=(*last.spans[:-1], replace(end, start=end.start + 1)))
    assert not replace(moved, decided=last.decided + 1).continues(last)
    # Taken in where it had been decided that nothing is.
    grown = NO_PASSES.grown(0, [["a"]]).grown(4, [["a", "b"]])
    assert not grown.continues(NO_PASSES.grown(0, [["a"]]).grown(4, [["a"]]))


@given(history=HISTORIES)
def test_passes_come_back_from_json(history):
    passes = told(history)[-1][2]
    assert from_dict(Passes, json.loads(json.dumps(to_dict(passes))), "here") == passes


def test_nothing_is_taken_in_from_a_cache_that_was_built_anew():
    passes = NO_PASSES.grown(0, [["a", "b"], ["x"]])
    later = passes.grown(8, [["b", "c"], ["x", "y"]])
    assert later.shards == (("a", "b"), ("x", "y"))
    assert [span.counts for span in later.spans] == [(2, 1), (2, 2)]


def test_a_worker_waits_until_the_first_one_has_decided(tmp_path, monkeypatch):
    main, other = Ledger(LocalFolder(tmp_path)), Ledger(LocalFolder(tmp_path))
    assert main.load() == NO_PASSES
    first = NO_PASSES.grown(0, [["a"]])
    main.save(first)
    assert other.wait(0) == first
    found = []
    waiting = threading.Thread(target=lambda: found.append(other.wait(1)))
    waiting.start()
    second = first.grown(4, [["a", "b"]])
    main.save(second)
    waiting.join()
    assert found == [second]
    monkeypatch.setattr(ledger_module, "PATIENCE", 0.0)
    with pytest.raises(CacheError, match="is run_dir shared by all nodes"):
        other.wait(2)


@pytest.mark.parametrize("text", [
    "{", '{"shards": 3}', '{"decided": 1, "other": 2}',
    '{"shards": [["a"]], "spans": [{"start": 0, "number": 0, "counts": [2]}], "decided": 1}',
    '{"shards": [["a"]], "spans": [{"start": 0, "number": 1, "counts": [1]}], "decided": 1}',
])  # fmt: skip
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / PASSES).write_text(text)
    with pytest.raises(CacheError, match=r"passes\.json' is damaged .*: remove it"):
        Ledger(LocalFolder(tmp_path)).load()
