"""The order in which rows are trained on."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.data.order import BLOCK, WINDOW, Rows, SampleOrder, Shuffle, Stream, cut, deal
from tinyflux.errors import CacheError

GROUPS = st.lists(st.integers(1, 23), min_size=1, max_size=4)


def order_of(counts, batch_size, seed, weights=None):
    """Sizes with so many neighbouring rows each, all in one cache, or each in its own."""
    starts = np.cumsum([0, *counts])
    chosen = np.ones(starts[-1], bool)
    parts = [Rows([range(a, b)], chosen) for a, b in pairwise(starts)]
    if weights is not None:
        streams = [[Stream(part, Fraction(w)) for part, w in zip(parts, weights, strict=True)]]
    else:
        streams = [[Stream(part, Fraction(len(part)))] for part in parts]
    return SampleOrder(streams, batch_size, seed)


def batches(order, batch_size, count, world=1):
    """The first batches, each put together from its workers' parts."""
    found = []
    for number in range(count):
        parts = cut(range(number * batch_size, (number + 1) * batch_size), world)
        found.append([row for part in parts for row in order.rows(part)])
    return found


@given(counts=GROUPS, batch_size=st.sampled_from([2, 4, 6]), seed=st.integers(0, 9))
def test_every_row_comes_equally_often_in_batches_of_one_size(counts, batch_size, seed):
    size_of = np.repeat(np.arange(len(counts)), counts)
    found = batches(order_of(counts, batch_size, seed), batch_size, sum(counts))
    assert all(len(set(size_of[batch])) == 1 for batch in found)
    # After so many batches every size has ended ``batch_size`` passes.
    rows = Counter(row for batch in found for row in batch)
    assert rows == dict.fromkeys(range(sum(counts)), batch_size)


@given(counts=GROUPS, seed=st.integers(0, 9), start=st.integers(0, 20), world=st.integers(1, 4))
def test_the_order_does_not_depend_on_workers_or_on_where_one_starts(counts, seed, start, world):
    found = batches(order_of(counts, 4, seed), 4, start + 3)
    assert found == batches(order_of(counts, 4, seed), 4, start + 3, world)
    late = order_of(counts, 4, seed)
    assert late.rows(range(start * 4, start * 4 + 4)) == found[start]


@given(count=st.integers(1, 3 * BLOCK * WINDOW + 7), seed=st.integers(0, 99))
def test_a_shuffle_is_a_permutation_whatever_the_count(count, seed):
    shuffled = Shuffle(count, seed)[np.arange(count)]
    assert np.array_equal(np.sort(shuffled), np.arange(count))


def test_a_large_shuffle_mixes_the_whole_dataset_and_each_pass_is_another():
    count = 100 * BLOCK * WINDOW + 5
    first, second = (Shuffle(count, seed)[np.arange(count)] for seed in (1, 2))
    assert not np.array_equal(first, second)
    for order in (first, second):
        # Where one starts says nothing of what comes.
        assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.05
        window = order[: BLOCK * WINDOW]
        assert np.ptp(window) > 0.9 * count
        # Neighbours in the dataset are rarely neighbours in the order.
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01
        # Reading stays with 64 neighbours at a time.
        assert len(np.unique(window // BLOCK)) <= 2 * WINDOW + 2
    # What shared a window in one pass is apart in the next.
    together = np.isin(second[: BLOCK * WINDOW], first[: BLOCK * WINDOW]).mean()
    assert together < 0.1


@given(shares=st.lists(st.integers(1, 9), min_size=1, max_size=5), position=st.integers(0, 999))
def test_a_deal_gives_everyone_their_share_of_any_window(shares, position):
    dealt = [deal(at, shares) for at in range(1000)]
    for who, share in enumerate(shares):
        mine = [before for owner, before in dealt if owner == who]
        assert mine == list(range(len(mine)))
        for begin in (0, position):
            got = sum(owner == who for owner, _ in dealt[begin:])
            limit = 2 if len(shares) == 2 else 4
            assert abs(got - (1000 - begin) * share / sum(shares)) < limit
    cycle = sum(shares)
    counts = Counter(owner for owner, _ in dealt[:cycle])
    assert counts == dict(enumerate(shares))


def test_a_mixture_has_its_weights_in_every_batch_however_many_rows_there_are():
    order = order_of([1000, 10], 8, seed=0, weights=[3, 1])
    for batch in batches(order, 8, 50):
        assert sum(row >= 1000 for row in batch) == 2
    small = [row for batch in batches(order, 8, 50) for row in batch if row >= 1000]
    assert Counter(small) == dict.fromkeys(range(1000, 1010), 10)


def test_rows_are_found_by_index_across_runs_and_gaps():
    chosen = np.random.default_rng(0).random(50_000) < 0.3
    runs = [range(100, 9000), range(20_000, 20_001), range(30_000, 50_000)]
    expected = np.concatenate([run.start + np.flatnonzero(chosen[run.start : run.stop])
                               for run in runs])  # fmt: skip
    rows = Rows(runs, chosen)
    assert len(rows) == len(expected)
    some = np.random.default_rng(1).permutation(len(expected))[:500]
    assert np.array_equal(rows[some], expected[some])


def test_a_mixture_without_rows_is_refused():
    with pytest.raises(CacheError, match="no samples"):
        SampleOrder([[Stream(Rows([range(3)], np.zeros(3, bool)), Fraction(1))]], 4, 0)
