"""The order in which rows are trained on."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tinyflux.distributed.data import SampleOrder, cut, rows_by_size, split_rows

GROUPS = st.lists(st.integers(1, 23), min_size=1, max_size=4)


def groups_of(counts):
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [list(range(at, at + count)) for at, count in zip(starts, counts, strict=True)]


def batches(groups, batch_size, seed, count, world=1):
    """The first batches, each put together from its workers' parts."""
    order = SampleOrder(groups, batch_size, seed)
    found = []
    for number in range(count):
        parts = cut(range(number * batch_size, (number + 1) * batch_size), world)
        found.append([row for part in parts for row in order.rows(part)])
    return found


@given(counts=GROUPS, batch_size=st.sampled_from([2, 4, 6]), seed=st.integers(0, 9))
def test_every_row_comes_equally_often_in_batches_of_one_size(counts, batch_size, seed):
    groups = groups_of(counts)
    size_of = {row: index for index, rows in enumerate(groups) for row in rows}
    passes = batch_size  # after which every size has ended a whole number of batches
    total = sum(counts) * passes // batch_size
    found = batches(groups, batch_size, seed, total)
    assert all(len({size_of[row] for row in batch}) == 1 for batch in found)
    assert Counter(row for batch in found for row in batch) == dict.fromkeys(size_of, passes)


@given(counts=GROUPS, seed=st.integers(0, 9), start=st.integers(0, 20))
def test_the_order_does_not_depend_on_workers_or_on_where_one_starts(counts, seed, start):
    groups = groups_of(counts)
    found = batches(groups, 4, seed, start + 3)
    assert found == batches(groups, 4, seed, start + 3, world=2)
    late = SampleOrder(groups, 4, seed)
    assert late.rows(range(start * 4, start * 4 + 4)) == found[start]


def test_each_pass_is_another_shuffle_of_all_rows():
    order = SampleOrder([list(range(100))], 10, seed=0)
    first, second = ([row for at in range(begin, begin + 100, 10) for row in
                      order.rows(range(at, at + 10))] for begin in (0, 100))  # fmt: skip
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)


def test_captions_of_one_picture_are_held_out_together():
    pictures = [f"picture {row // 3}" for row in range(300)]
    train, held_out = split_rows(pictures, 0.2)
    assert sorted(train + held_out) == list(range(300))
    assert 0 < len(held_out) < 150
    assert not {pictures[row] for row in train} & {pictures[row] for row in held_out}


class Runs:
    def grids(self):
        return [((4, 4), range(3)), ((2, 8), range(3, 5)), ((4, 4), range(5, 9))]


def test_rows_are_put_together_by_size():
    assert rows_by_size(Runs(), [0, 2, 4, 5, 8]) == [[4], [0, 2, 5, 8]]
    assert rows_by_size(Runs(), [3]) == [[3]]
