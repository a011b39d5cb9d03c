"""Differences, intervals and their laws, against numbers worked out by hand and by formulas."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from tinyflux.compare.analysis import at_second, compare, detectable, first_reach, subtract, verdict
from tinyflux.compare.record import SHARES, Curve
from tinyflux.compare.results import read_curve, seconds_at
from tinyflux.errors import InputError

VALUES = st.floats(-10, 10).map(lambda value: round(value, 6))
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12)


def curve(*values, seconds=1.0):
    """A curve looked at every ten steps, each of which takes so many seconds."""
    steps = [10 * index for index in range(len(values))]
    return Curve(steps, [step * seconds for step in steps], list(values))


def test_a_difference_by_hand():
    # Differences -1, -2, -3: mean -2, standard deviation 1, error 1 / sqrt 3; t(0.975, 2) = 4.3027.
    found = subtract([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found.by_seed == [-1.0, -2.0, -3.0]
    assert found.mean == -2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.includes_zero
    # Two more such seeds, t(0.975, 5) = 2.5706 and error sqrt(0.8 / 6): no zero inside.
    more = subtract([0.0] * 6, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert more.half_width == pytest.approx(2.570582 * math.sqrt(0.8 / 6), rel=1e-6)
    assert more.includes_zero is False


@given(PAIRS)
def test_a_difference_turned_round_is_its_negative(pairs):
    first, second = zip(*pairs, strict=True)
    one, other = subtract(first, second), subtract(second, first)
    assert one.mean == -other.mean
    assert one.half_width == other.half_width
    assert one.detectable == other.detectable


@given(PAIRS, VALUES)
def test_what_both_gain_changes_nothing(pairs, shift):
    first, second = map(np.array, zip(*pairs, strict=True))
    here, there = subtract(first, second), subtract(first + shift, second + shift)
    assert there.mean == pytest.approx(here.mean, abs=1e-9)
    assert there.half_width == pytest.approx(here.half_width, abs=1e-7)


@given(st.lists(VALUES, min_size=1, max_size=9))
def test_equal_arms_differ_by_exactly_nothing(values):
    found = subtract(values, values)
    assert found.mean == 0.0
    assert found.half_width in (None, 0.0)
    assert "exactly the same value" in verdict("same", "base", found, True)


@given(PAIRS)
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    first, second = map(np.array, zip(*pairs, strict=True))
    assume(np.std(first - second) > 1e-3)
    found = subtract(list(first), list(second))
    wanted = stats.ttest_rel(first, second)
    low, high = wanted.confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(low, abs=1e-9)
    assert found.mean + found.half_width == pytest.approx(high, abs=1e-9)
    assert found.includes_zero == (wanted.pvalue >= 0.05)


@pytest.mark.parametrize("count", [2, 3, 5, 10, 30])
def test_a_detectable_effect_is_seen_four_times_out_of_five(count):
    random = np.random.default_rng(count)
    samples = random.standard_normal((40_000, count)) + detectable(count) / math.sqrt(count)
    # By the noncentral t the true error is 1 / sqrt n; each sample has its own estimate of it.
    seen = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.01)


def test_words():
    null = verdict("lune", "base", subtract([1.0, 2.0, 3.0], [2.0, 4.0, 2.0]), True)
    assert null.startswith("lune cannot be told from base: -0.6667 ± ")
    assert "with 3 seeds an effect of" in null
    difference = subtract([1.0, 1.1, 1.2], [2.0, 2.11, 2.22])
    assert verdict("a", "b", difference, True).startswith("a is better than b: -1.0100 ± ")
    assert verdict("a", "b", difference, False).startswith("a is worse than b")
    assert "one seed" in verdict("a", "b", subtract([1.0], [2.0]), True)
    lost = subtract([1.0, None], [2.0, 2.0])
    assert lost.mean is None
    assert "With 1 of 2 seeds a or b was not finite" in verdict("a", "b", lost, True)


def test_equal_steps_and_equal_wall_clock_are_two_questions():
    # The arm halves its loss in each look, and takes twice as long for a step.
    arms = [curve(8.0, 4.0, 2.0, seconds=2.0), curve(8.0, 4.0, 2.0, seconds=2.0)]
    bases = [curve(8.0, 5.0, 3.0), curve(8.0, 5.0, 3.5)]
    found = compare("slow", "base", "loss", arms, bases, lower_is_better=True)
    assert found.steps == [0, 10, 20]
    assert found.at_steps[-1].by_seed == [-1.0, -1.5]
    # Both have 20 seconds: the arm is at its step 10 then.
    assert found.seconds == [20 * share for share in SHARES]
    assert found.at_seconds[-1].by_seed == [1.0, 0.5]
    # It has 3.0 half way from 4.0 to 2.0, and 3.5 a quarter of the way.
    assert found.reached.steps == [15.0, 12.5]
    assert found.reached.seconds == [30.0, 25.0]
    assert (found.reached.other_steps, found.reached.other_seconds) == ([20, 20], [20.0, 20.0])


def test_only_steps_that_all_recorded_are_compared():
    found = compare("a", "b", "loss", [curve(3.0, 2.0)], [curve(3.0, 2.0, 1.0)], True)
    assert found.steps == [0, 10]
    assert found.reached.steps == [None]
    with pytest.raises(InputError, match="no step at which both recorded loss"):
        compare("a", "b", "loss", [Curve([1], [1.0], [1.0])], [curve(3.0)], True)


@given(st.lists(VALUES, min_size=1, max_size=9), VALUES)
def test_reaching_mirrors_where_more_is_better(values, target):
    turned = [-value for value in values]
    found = first_reach(values, target, True)
    assert found == first_reach(turned, -target, False)
    assert (found is None) == (min(values) > target)
    if found is not None:
        # On the line between two looks the curve has the target, unless it began below.
        at = np.interp(found, range(len(values)), values)
        assert at == pytest.approx(target, abs=1e-6) or found == 0


def test_what_is_not_finite_is_no_number():
    lost = Curve([0, 10], [0.0, 1.0], [1.0, None])
    assert at_second(lost, 0.5) is None
    assert first_reach(lost.values, 0.5, True) is None
    assert first_reach([1.0, 0.5], None, True) is None
    assert read_curve([{"step": 1, "loss": None, "samples_per_s": 2.0}], "loss", 2).values == [None]


def test_seconds_follow_from_the_rates_that_a_run_recorded():
    # Batches of 8: 4 steps at 16 a second, then 2 at 4 a second; looks are recorded beside rates.
    records = [
        {"step": 4, "samples_per_s": 16.0},
        {"step": 6, "samples_per_s": 4.0},
        {"step": 6, "val_velocity": 1.0},
        {"step": 0, "val_velocity": 3.0},
    ]
    assert list(seconds_at(records, 8, [0, 2, 4, 5, 6, 7])) == [0.0, 1.0, 2.0, 4.0, 6.0, 8.0]
    assert read_curve(records, "val_velocity", 8) == Curve([0, 6], [0.0, 6.0], [3.0, 1.0])
