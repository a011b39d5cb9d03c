"""Lines over training steps, drawn as SVG."""

import io
from collections.abc import Mapping
from typing import Any

from tinyflux.errors import MissingDependencyError

# Steps and values of a line.
Line = tuple[list[int], list[float]]
# Lower and upper edges of a band around a line.
Band = tuple[list[float], list[float]]


def lines_of(records: list[dict[str, Any]], **keys: str) -> dict[str, Line]:
    """A line for each of ``label=key``, from the records that have the key.

    A label's underscores become spaces; a key that no record has gives no line.
    """
    lines: dict[str, Line] = {}
    for label, key in keys.items():
        having = [record for record in records if record.get(key) is not None]
        if having:
            steps = [record["step"] for record in having]
            lines[label.replace("_", " ")] = steps, [record[key] for record in having]
    return lines


def load_pyplot() -> Any:
    """Matplotlib's pyplot, drawing without a screen.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs the package matplotlib: pip install 'tinyflux[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def chart(
    lines: Mapping[str, Line],
    ylabel: str,
    bands: Mapping[str, Band] | None = None,
    first_color: int = 0,
) -> str:
    """The lines in one figure, as an ``<svg>`` element.

    Args:
        bands: of lines by name, drawn behind them; a figure that has zero inside shows it.
        first_color: of matplotlib's cycle, for figures beside each other.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(5.2, 3), layout="constrained")
    for index, (name, (steps, values)) in enumerate(lines.items(), start=first_color):
        color, marker = f"C{index}", "o" if len(steps) < 20 else ""
        axes.plot(steps, values, color=color, marker=marker, markersize=3, label=name)
        if bands and name in bands:
            axes.fill_between(steps, *bands[name], color=color, alpha=0.15, lw=0)
    low, high = axes.get_ylim()
    if low < 0 < high:
        axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue().split("?>", 1)[-1]
