"""A comparison's page: curves with bands, differences with intervals, and the pictures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tinyflux import run_dir as names
from tinyflux.compare.analysis import subtract
from tinyflux.compare.record import CompareRecord, Comparison, Reached, TrialRecord
from tinyflux.report.charts import Band, Line, chart
from tinyflux.report.html import data_url, fill, twice_its_width
from tinyflux.storage.folder import Folder
from tinyflux.util.text import duration

PAGE = Path(__file__).with_name("page.html")


def make_page(record: CompareRecord, output: Folder) -> str:
    """The comparison's page, with everything that it shows inside.

    Args:
        output: the comparison's folder, with the trials' grids.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return fill(
        PAGE,
        record=record,
        machines=sorted(
            {f"{one.machine}, threads of a trial: {one.threads}" for one in record.trials}
        ),
        tables=[_Table.of(record, metric) for metric in record.metrics],
        curves=[_curves(record, metric) for metric in record.metrics],
        differences=[_differences(record, metric) for metric in record.metrics],
        pictures=_pictures(record, output),
        duration=duration,
        first=_first_reached,
        width=interval,
    )


@dataclass(frozen=True)
class _Table:
    """A metric, the last values of each arm, and the comparisons by it."""

    metric: str
    last: dict[str, str]
    comparisons: list[Comparison]

    @classmethod
    def of(cls, record: CompareRecord, metric: str) -> "_Table":
        last = {arm.name: _last(record.of(arm.name), metric) for arm in record.arms}
        return cls(metric, last, record.against(metric))


def _last(trials: Sequence[TrialRecord], metric: str) -> str:
    """The mean of the trials' last values."""
    values = [trial.curves[metric].values[-1] for trial in trials]
    finite = [value for value in values if value is not None]
    return f"{statistics.fmean(finite):.4f}" if len(finite) == len(values) else "not finite"


def interval(mean: float | None, half_width: float | None) -> str:
    """``-0.0433 ± 0.0117``, as far as there is one."""
    if mean is None:
        return "not finite"
    return f"{mean:+.4f}" if half_width is None else f"{mean:+.4f} ± {half_width:.4f}"


def _first_reached(reached: Reached) -> str:
    """When the last value of the other was reached, in words."""
    pairs = zip(reached.steps, reached.seconds, strict=True)
    found = [(step, second) for step, second in pairs if step is not None and second is not None]
    if not found:
        return "never"
    steps = statistics.median(step for step, _ in found)
    seconds = statistics.median(second for _, second in found)
    of = f"{statistics.median(reached.other_steps):.0f}"
    text = f"step {steps:.0f} of {of}, {duration(seconds)} (median)"
    missing = len(reached.steps) - len(found)
    return text if not missing else f"{text}; never with {missing} of {len(reached.steps)} seeds"


def _curves(record: CompareRecord, metric: str) -> str:
    """Each arm's mean with the 95% interval of that mean over seeds."""
    lines: dict[str, Line] = {}
    bands: dict[str, Band] = {}
    for arm in record.arms:
        curves = [trial.curves[metric] for trial in record.of(arm.name)]
        steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
        at = [[curve.values[curve.steps.index(step)] for curve in curves] for step in steps]
        means = [subtract(values, [0.0] * len(values)) for values in at]
        _add(
            lines,
            bands,
            arm.name,
            [(s, m.mean, m.half_width) for s, m in zip(steps, means, strict=True)],
        )
    return chart(lines, metric, bands)


def _differences(record: CompareRecord, metric: str) -> str:
    """Each arm's paired difference by step, with its interval."""
    lines: dict[str, Line] = {}
    bands: dict[str, Band] = {}
    for one in record.against(metric):
        points = [
            (step, found.mean, found.half_width)
            for step, found in zip(one.steps, one.at_steps, strict=True)
        ]
        _add(lines, bands, f"{one.arm} to {one.to}", points)
    # The base, whose colour is the first, is the line at zero.
    return chart(lines, f"difference of {metric}", bands, first_color=1)


def _add(
    lines: dict[str, Line],
    bands: dict[str, Band],
    name: str,
    points: Sequence[tuple[int, float | None, float | None]],
) -> None:
    """A line through the points that are finite, and a band of their half widths."""
    finite = [(step, mean, half or 0.0) for step, mean, half in points if mean is not None]
    lines[name] = [step for step, _, _ in finite], [mean for _, mean, _ in finite]
    bands[name] = (
        [mean - half for _, mean, half in finite],
        [mean + half for _, mean, half in finite],
    )


@dataclass(frozen=True)
class _Picture:
    """A trial's last grid as a data URL, or None where none was drawn, at twice its size."""

    arm: str
    seed: int
    png: str | None
    width: int


def _pictures(record: CompareRecord, output: Folder) -> dict[int, list[_Picture]]:
    """The trials' last grids by seed; nothing if no trial drew any."""
    found = [_picture(trial, output) for trial in record.trials]
    if all(picture.png is None for picture in found):
        return {}
    return {seed: [one for one in found if one.seed == seed] for seed in record.seeds}


def _picture(trial: TrialRecord, output: Folder) -> _Picture:
    files = output.list(f"{trial.run_dir}/{names.SAMPLES}")
    grids = sorted(path for path in files if fnmatch(path, "*/step_*.png"))
    if not grids:
        return _Picture(trial.arm, trial.seed, None, 0)
    png = output.read(grids[-1])
    return _Picture(trial.arm, trial.seed, data_url(png), twice_its_width(png))
