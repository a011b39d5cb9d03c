"""An evaluation's figures for people: a row a metric, beside what it is to be compared with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.record import SetFigures, SpaceFigures

# Metrics by name as people read them; shares are told in percent.
_VALUES = {"kid": "KID", "fid": "FID", "cmmd": "CMMD", "density": "density",
           "clip_score": "CLIP score"}  # fmt: skip
_SHARES = {
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "retrieval": "retrieval of its caption",
}
ACCURACY, AMONG_TRAINED = "_accuracy", "_among_trained"


@dataclass(frozen=True)
class TableRow:
    """A metric of a set, in words; what there is none of is empty.

    Attributes:
        metric: Such as ``KID`` or ``thing``.
        name: Its name in the record, such as ``thing_accuracy``.
        by: The extractor.
        drawn: What the drawn pictures reach, with its 95% interval.
        real: What the real pictures reach.
        nearest: What the training pictures reach that are nearest to the drawn ones.
        chance: What guessing reaches.
        note: What to keep in mind.
    """

    metric: str
    name: str
    by: str
    drawn: str
    real: str = ""
    nearest: str = ""
    chance: str = ""
    note: str = ""


def rows_of(chosen: SetFigures) -> list[TableRow]:
    """The rows of a set: distances, spread, captions, then labels, for each extractor."""
    return [row for space in chosen.spaces for row in rows_of_space(space)]


def rows_of_space(space: SpaceFigures) -> Iterator[TableRow]:
    """The rows of one extractor's figures."""
    figures = space.figures
    for name, metric in {**_VALUES, **_SHARES}.items():
        if name in figures:
            shown = share if name in _SHARES else value
            real = figures.get(f"real_{name}")
            yield TableRow(
                metric, name, space.extractor, shown(figures[name]),
                real=shown(real) if real else "", note=figures[name].note,
            )  # fmt: skip
    for label in labels_of(figures):
        yield from _label_rows(space, label)


def labels_of(figures: Mapping[str, Estimate]) -> list[str]:
    """The label columns that figures tell of, such as ``thing``."""
    found = [
        name.removeprefix("nearest_").removesuffix(ACCURACY)
        for name in figures
        if name.endswith(ACCURACY) and not name.startswith(("real_", "chance_"))
    ]
    return list(dict.fromkeys(found))


def _label_rows(space: SpaceFigures, label: str) -> Iterator[TableRow]:
    """A label among all that the classifier has, and among those of training."""
    figures = space.figures

    def shown(name: str) -> str:
        return share(figures[name]) if name in figures else ""

    nearest = f"nearest_{label}{ACCURACY}"
    judged = [
        name
        for name in (f"{label}{ACCURACY}", f"{label}{ACCURACY}{AMONG_TRAINED}")
        if name in figures
    ]
    for name in judged:
        among = " of those in training" if name.endswith(AMONG_TRAINED) else ""
        yield TableRow(
            f"right {label}{among}", name, space.extractor, shown(name), shown(f"real_{name}"),
            shown(nearest), shown(f"chance_{name}"),
        )  # fmt: skip
    if not judged and nearest in figures:
        yield TableRow(f"right {label}", nearest, space.extractor, "", nearest=shown(nearest))


def value(estimate: Estimate) -> str:
    """E.g. ``0.0123 (0.01 to 0.0146)``."""
    return _with_interval(estimate, lambda number: f"{number:.3g}")


def share(estimate: Estimate) -> str:
    """E.g. ``62% (55% to 69%)``; shares under a percent have a digit more."""
    return _with_interval(estimate, percent)


def percent(number: float) -> str:
    """E.g. ``62%`` or ``0.7%``."""
    return f"{number:.1%}" if 0 < number < 0.01 else f"{number:.0%}"


def _with_interval(estimate: Estimate, told: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return told(estimate.value)
    return f"{told(estimate.value)} ({told(estimate.low)} to {told(estimate.high)})"
