"""What each benchmark leaves: its figures and the machine, as JSON on stdout and in a file.

Files that the pages quote lie in ``benchmarks/results``; ``tables.py`` makes the tables of them.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``, for :func:`record`."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what is printed there, too"
    )


def machine() -> str:
    """This machine and its torch, in words."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"


def record(figures: Mapping[str, Any], file: Path | None) -> None:
    """Print ``figures`` after the machine, and write them to ``file`` if there is one."""
    text = json.dumps({"machine": machine(), **figures}, indent=2)
    print(text, flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
