"""One self-contained HTML page that shows what a run did."""

import json
from pathlib import Path
from typing import Any

from tinyflux import run_dir as names
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.store import open_store
from tinyflux.config import RunConfig
from tinyflux.distributed.mirror import working_copy
from tinyflux.errors import TinyFluxError
from tinyflux.evaluation.record import Measured
from tinyflux.evaluation.table import rows_of, share
from tinyflux.report.charts import chart, lines_of
from tinyflux.report.html import data_url, fill, twice_its_width
from tinyflux.toy.icons import ATTRIBUTION
from tinyflux.trainer.metrics import read_metrics
from tinyflux.util.config import from_dict
from tinyflux.util.files import atomic_write
from tinyflux.util.urls import join

PAGE = Path(__file__).with_name("page.html")


def write_report(run: RunConfig) -> str:
    """Write ``report.html`` from what the stages left in the run directory; its place.

    Raises:
        TinyFluxError: the run was not trained or not evaluated yet.
    """
    with working_copy(run.run_dir) as run_dir:
        page = _fill_page(run_dir, run)
        atomic_write(run_dir / names.REPORT, page.encode())
    return join(run.run_dir, names.REPORT)


def _fill_page(run_dir: Path, run: RunConfig) -> str:
    evaluation = _read(run_dir / names.EVALUATION)
    records = read_metrics(run_dir / names.METRICS)
    if evaluation is None or not records:
        missing = names.EVALUATION if evaluation is None else names.METRICS
        raise TinyFluxError(
            f"there is no {missing} in '{run.run_dir}': train and evaluate first, or `tinyflux run`"
        )
    steps = max(record["step"] for record in records)
    stages = _read(run_dir / names.STAGES) or {}
    served = _read(run_dir / names.SERVED)
    return fill(
        PAGE,
        title=f"TinyFlux run {run_dir.name}",
        run=run,
        evaluation=evaluation,
        **_measured(run_dir, evaluation),
        steps=steps,
        world=_read(Path(run.zoo.vae_repo) / "world.json"),
        attribution=ATTRIBUTION,
        drawn=_pictures(run_dir, evaluation, "picture"),
        shown=_pictures(run_dir, evaluation, "reference"),
        served=served
        and {**served, "png": data_url((run_dir / names.SERVED_PICTURE).read_bytes())},
        grids=_grids(run_dir),
        charts=_charts(records),
        stages=stages,
        rates=dict.fromkeys(stages, "") | _rates(run, stages, steps, served),
    )


def _measured(run_dir: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures that extractors gave, their tables, and pictures of each set."""
    if "measured" not in evaluation:
        return {"measured": None}
    measured = from_dict(Measured, evaluation["measured"], names.EVALUATION)
    shots = {
        chosen.name: [
            {
                "caption": one.caption,
                "drawn": data_url((run_dir / one.file).read_bytes()),
                "real": data_url((run_dir / one.real).read_bytes()) if one.real else "",
            }
            for one in chosen.pictures
        ]
        for chosen in measured.sets
    }
    tables = {chosen.name: rows_of(chosen) for chosen in measured.sets}
    return {"measured": measured, "tables": tables, "shots": shots, "share": share}


def _read(path: Path) -> Any:
    """A JSON file, or None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def _pictures(run_dir: Path, evaluation: dict[str, Any], kind: str) -> list[dict[str, str]]:
    """Prompts and pictures of the evaluation: a ``"picture"`` drawn, or its ``"reference"``."""
    folder = run_dir / names.EVALUATION_PICTURES
    return [
        {"prompt": pair["prompt"], "png": data_url((folder / pair[kind]).read_bytes())}
        for pair in evaluation["nearest"]["pictures"]
    ]


def _grids(run_dir: Path) -> list[dict[str, Any]]:
    """The sample grids in the order of their steps, to be shown at twice their size."""
    grids = sorted((run_dir / names.SAMPLES).glob("*.png"), key=_step_of)
    shown = [(_step_of(path), path.read_bytes()) for path in grids]
    return [
        {"step": step, "png": data_url(png), "width": twice_its_width(png)} for step, png in shown
    ]


def _charts(records: list[dict[str, Any]]) -> list[str]:
    held_out = {"EMA_weights": "val_velocity_ema", "raw_weights": "val_velocity"}
    figures = (
        ("training loss", {"total": "loss", "velocity": "loss_main"}),
        ("distillation loss", {"Lune": "loss_lune", "Sol": "loss_sol"}),
        ("held-out velocity loss", held_out),
    )
    drawn = ((ylabel, lines_of(records, **keys)) for ylabel, keys in figures)
    return [chart(lines, ylabel) for ylabel, lines in drawn if lines]


def _rates(
    run: RunConfig, stages: dict[str, Any], steps: int, served: dict[str, Any] | None
) -> dict[str, str]:
    """What the stages that are known by a rate achieved, their start-up counted."""
    rates = {}
    if "cache" in stages:
        rows = Manifest.load(open_store(run.cache.path)).rows
        rate = rows / max(stages["cache"]["seconds"], 1e-9)
        rates["cache"] = f"{rate:.1f} samples/s with start-up"
    if "train" in stages:
        rate = steps * run.trainer.batch_size / max(stages["train"]["seconds"], 1e-9)
        rates["train"] = f"{rate:.0f} samples/s with start-up"
    if served is not None:
        rates["serve"] = f"{served['seconds']:.2f} s for the picture"
    return rates


def _step_of(grid: Path) -> int:
    """``step_00001000.png`` -> 1000."""
    digits = grid.stem.rsplit("_", 1)[-1]
    return int(digits) if digits.isdigit() else 0
