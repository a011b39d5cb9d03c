"""The pages' tables of figures, made of ``benchmarks/results``: ``python benchmarks/tables.py``.

A page says where a table belongs by the name of its record: ``<!-- figures: NAME -->`` before it
and ``<!-- end of figures -->`` after it. What is between is written anew; with ``--check`` it is
compared, and the exit status is 1 if a page says something else than its record.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)
Record = Mapping[str, Any]
Rows = Iterator[Sequence[str]]

LOADERS = {
    "tinyflux": "this one",
    "litdata": "litdata {version}",
    "mosaicml-streaming": "mosaicml-streaming {version} (MDS)",
    "webdataset": "WebDataset {version}",
    "ray data": "Ray Data {version}",
    "memory map": "random rows of a memory map",
    "sequential": "the files, one after another",
}


def reading(record: Record) -> Rows:
    """Of ``reading.py``."""
    yield "loader", "samples/s warm", "cold", "first batch, warm and cold (s)"
    for loader, name in LOADERS.items():
        found = record["loaders"][loader]
        rates = [f"{found[state]['samples_per_second']:,.0f}" for state in ("warm", "cold")]
        # The last two have no start that is worth a figure.
        waits = [found[state].get("first_batch_seconds") for state in ("warm", "cold")]
        first = ", ".join(_seconds(each) for each in waits if each is not None)
        yield name.format(version=found.get("version")), *rates, first


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def leaving(record: Record) -> Rows:
    """Of ``soak.py --waves``; the first figure of its memory is before any wave."""
    yield "", "after the first", "fifth", "ninth wave"
    processes = {"model-tinyflux": "engine's replica", "api": "`api`"}
    for process, name in processes.items():
        for who, does in (("leaving", "all leave"), ("staying", "all stay")):
            memory = record[who]["memory_mib"][process]
            yield f"{name}, {does}", *(str(memory[wave]) for wave in (1, 5, 9))


def shift(record: Record) -> Rows:
    """Of a comparison of timestep shifts."""
    yield "`shift`", "mean", "to 1, 95% interval", *(f"t = {time}" for time in record["times"])
    for value, arm in record["arms"].items():
        gap = f"{arm['to_1']:+.3f} ± {arm['interval']:.3f}" if "to_1" in arm else ""
        yield value, f"{arm['mean']:.3f}", gap, *(f"{loss:.3f}" for loss in arm["by_time"])


TABLES: dict[str, Callable[[Record], Rows]] = {
    "reading": reading, "leaving": leaving, "shift": shift
}  # fmt: skip


def table(name: str) -> str:
    """The table of a record, as Markdown."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    head, *rows = TABLES[name](record)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def filled(page: str) -> str:
    """A page's text with its tables as the records have them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[4]}", page)


def main() -> int:
    """Fill all pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    status = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        made = filled(text)
        if made == text:
            continue
        if options.check:
            name = page.relative_to(ROOT)
            print(f"{name} differs from benchmarks/results: run python benchmarks/tables.py",
                  file=sys.stderr)  # fmt: skip
            status = 1
        else:
            page.write_text(made)
    return status


if __name__ == "__main__":
    sys.exit(main())
