"""Paired differences with their intervals, from curves alone."""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from tinyflux.compare.record import SHARES, Comparison, Curve, Difference, Reached
from tinyflux.errors import InputError, MissingDependencyError

try:
    from scipy import optimize, stats
except ImportError as error:
    raise MissingDependencyError(
        "a comparison needs the package scipy: pip install 'tinyflux[report]'"
    ) from error

LEVEL = 0.95  # of intervals
POWER = 0.8  # "four of five"


def subtract(first: Sequence[float | None], second: Sequence[float | None]) -> Difference:
    """``first`` less ``second`` by seed, with the paired 95% t-interval of the mean."""
    by_seed = [
        None if one is None or other is None else one - other
        for one, other in zip(first, second, strict=True)
    ]
    finite = [difference for difference in by_seed if difference is not None]
    if len(finite) < len(by_seed) or not finite:
        return Difference(by_seed, None, None, None)
    mean, count = statistics.fmean(finite), len(finite)
    if count == 1:
        return Difference(by_seed, mean, None, None)
    error = statistics.stdev(finite) / math.sqrt(count)
    half_width = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Difference(by_seed, mean, half_width, detectable(count) * error)


def detectable(count: int) -> float:
    """The effect, in standard errors, that ``count`` pairs tell from zero with :data:`POWER`.

    The power of a paired t-test is ``P(T > t)`` of a noncentral t (Cohen 1988); that of the wrong
    side is nothing beside it.
    """
    degrees = count - 1
    quantile = stats.t.ppf((1 + LEVEL) / 2, degrees)

    def lacking(effect: float) -> float:
        return float(stats.nct.sf(quantile, degrees, effect)) - POWER

    # The effect is between the quantile, with a power of half or so, and twice that.
    return float(optimize.brentq(lacking, 0.5 * quantile, 2 * quantile))


def compare(
    arm: str,
    to: str,
    metric: str,
    curves: Sequence[Curve],
    others: Sequence[Curve],
    lower_is_better: bool,
    paired: bool = True,
) -> Comparison:
    """``arm`` against ``to`` by curves of the same seeds in the same order.

    Raises:
        InputError: the curves share no step.
    """
    shared = set.intersection(*(set(curve.steps) for curve in (*curves, *others)))
    if not shared:
        raise InputError(f"'{arm}' and '{to}' have no step at which both recorded {metric}")
    steps = sorted(shared)
    at_steps = [
        subtract([_at_step(one, step) for one in curves], [_at_step(one, step) for one in others])
        for step in steps
    ]
    both = [
        min(one.seconds[-1], other.seconds[-1]) for one, other in zip(curves, others, strict=True)
    ]
    at_seconds = [
        subtract(
            [at_second(one, share * end) for one, end in zip(curves, both, strict=True)],
            [at_second(one, share * end) for one, end in zip(others, both, strict=True)],
        )
        for share in SHARES
    ]
    return Comparison(
        arm=arm,
        to=to,
        metric=metric,
        paired=paired,
        steps=steps,
        at_steps=at_steps,
        seconds=[share * statistics.fmean(both) for share in SHARES],
        at_seconds=at_seconds,
        reached=_reached(curves, others, lower_is_better),
        verdict=verdict(arm, to, at_steps[-1], lower_is_better),
        clock_verdict=verdict(arm, to, at_seconds[-1], lower_is_better),
    )


def verdict(arm: str, to: str, difference: Difference, lower_is_better: bool) -> str:
    """A difference in one plain sentence."""
    mean, half_width = difference.mean, difference.half_width
    seeds = len(difference.by_seed)
    if mean is None:
        lost = sum(one is None for one in difference.by_seed)
        return f"With {lost} of {seeds} seeds {arm} or {to} was not finite: there is no mean."
    if all(one == 0 for one in difference.by_seed):
        return f"{arm} and {to} have exactly the same value with every seed."
    if half_width is None or difference.detectable is None:
        return f"{arm} is {mean:+.4f} from {to} with one seed, which has no interval."
    if difference.includes_zero:
        return (
            f"{arm} cannot be told from {to}: {mean:+.4f} ± {half_width:.4f}; with {seeds} seeds "
            f"an effect of {difference.detectable:.4f} would have been seen four times out of five."
        )
    better = (mean < 0) == lower_is_better
    return (
        f"{arm} is {'better' if better else 'worse'} than {to}: {mean:+.4f} ± {half_width:.4f} "
        f"({seeds} seeds)."
    )


def at_second(curve: Curve, second: float) -> float | None:
    """The curve after so many seconds, along the line between two looks; its ends beyond them."""
    if any(value is None for value in curve.values):
        return None
    return float(np.interp(second, curve.seconds, [value or 0.0 for value in curve.values]))


def _at_step(curve: Curve, step: int) -> float | None:
    return curve.values[curve.steps.index(step)]


def _reached(curves: Sequence[Curve], others: Sequence[Curve], lower_is_better: bool) -> Reached:
    steps: list[float | None] = []
    seconds: list[float | None] = []
    for curve, other in zip(curves, others, strict=True):
        place = first_reach(curve.values, other.values[-1], lower_is_better)
        index = list(range(len(curve.steps)))
        steps.append(None if place is None else float(np.interp(place, index, curve.steps)))
        seconds.append(None if place is None else float(np.interp(place, index, curve.seconds)))
    return Reached(
        steps=steps,
        seconds=seconds,
        other_steps=[other.steps[-1] for other in others],
        other_seconds=[other.seconds[-1] for other in others],
    )


def first_reach(
    values: Sequence[float | None], target: float | None, lower_is_better: bool
) -> float | None:
    """Between which looks a curve first is as good as ``target``, as a fraction of their index."""
    if target is None:
        return None
    sign = 1.0 if lower_is_better else -1.0
    before: float | None = None
    for index, value in enumerate(values):
        if value is not None and sign * value <= sign * target:
            if before is None:
                return float(index)
            return index - 1 + (before - target) / (before - value)
        before = value
    return None
