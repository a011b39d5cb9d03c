"""The pages' tables of figures, made of their records: ``python benchmarks/tables.py``.

The records lie in ``benchmarks/results`` and ``configs/compare/results``.

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
COMPARISONS = ROOT / "configs" / "compare" / "results"
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


def comparison(record: Record) -> Rows:
    """Of a ``comparison.json`` of `tinyflux compare`: what each arm changes."""
    yield "", "last value of the other arm", "at equal steps", "at equal wall clock"
    for made in record["comparisons"]:
        last = [trial["curves"][made["metric"]]["values"][-1] for trial in record["trials"]
                if trial["arm"] == made["to"]]  # fmt: skip
        decides = " (decides)" if made["metric"] == record["metric"] else ""
        gaps = [
            f"{gap['mean']:+.4f} ± {gap['half_width']:.4f}" if gap else ""
            for gap in (made["at_steps"][-1], made["at_seconds"][-1])
        ]
        name = f"{made['arm']} to {made['to']}, `{made['metric']}`{decides}"
        yield name, f"{sum(last) / len(last):.4f}", *gaps


def presets(record: Record) -> Rows:
    """Of ``presets.py``."""
    sizes = ", ".join(record["presets"]["s"]["flops"])
    yield ("`preset`", f"TFLOP a sample at {sizes} px", "GB of activations a sample",
           "GB of a worker's state", "GB of a checkpoint")  # fmt: skip
    for name, found in record["presets"].items():
        flops = ", ".join(f"{value / 1e12:.3g}" for value in found["flops"].values())
        kept = ", ".join(f"{value / 1e9:.3g}" for value in found["activation_bytes"].values())
        state = f"{found['state_bytes'] / 1e9:.1f}"
        yield f"`{name}`", flops, kept, state, f"{found['checkpoint_bytes'] / 1e9:.2f}"


MODELS = {
    "flux": "`FluxTransformer2DModel`",
    "ours": "the default model",
    "ours_trunk": "without its predictors, with FLUX's options",
    "ours_compiled": "the default model, blocks compiled",
    "ours_patch_2": "the default model at patch 2",
}


def peers(record: Record) -> Rows:
    """Of ``peers.py``."""
    yield "", "parameters", "samples/s", "to FLUX's, 95% interval", "to patch 1, 95% interval"
    for name, words in MODELS.items():
        gaps = (record["ratios"].get(f"{name} to {other}") for other in ("flux", "ours"))
        ratios = [
            f"{gap['ratio']:.2f} ({gap['interval'][0]:.2f} to {gap['interval'][1]:.2f})"
            if gap
            else ""
            for gap in gaps
        ]
        size = f"{record['parameters'][name] / 1e6:.1f}M"
        yield words, size, f"{record['samples_per_s'][name]:.2f}", *ratios


TABLES: dict[str, Callable[[Record], Rows]] = {
    "reading": reading, "leaving": leaving, "shift": shift, "presets": presets,
    "peers": peers,
    "demo_teachers": comparison,
}  # fmt: skip


def table(name: str) -> str:
    """The table of a record, as Markdown."""
    files = (place / f"{name}.json" for place in (RESULTS, COMPARISONS))
    record = json.loads(next(file for file in files if file.is_file()).read_text())
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
