"""One self-contained HTML page that shows what a run did."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tinyflux import run_dir as names
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.store import open_store
from tinyflux.config import RunConfig
from tinyflux.distributed.mirror import working_copy
from tinyflux.errors import MissingDependencyError, TinyFluxError
from tinyflux.toy.openmoji import ATTRIBUTION
from tinyflux.trainer.metrics import read_metrics
from tinyflux.util.files import atomic_write
from tinyflux.util.urls import join

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fafafa;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .35rem .6rem;
  border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.n { text-align: right; }
code { font-size: .85em; background: #eee; padding: .1em .3em; overflow-wrap: anywhere; }
figure { display: inline-block; margin: .3rem; text-align: center; width: 6.5rem;
         vertical-align: top; font-size: .75rem; line-height: 1.2; }
img { image-rendering: pixelated; max-width: 100%; } figure img { width: 6rem; height: 6rem; }
.big { font-size: 2rem; font-weight: 600; }
.figures { display: flex; gap: 2.5rem; flex-wrap: wrap; }
.note { color: #555; font-size: .9rem; }
"""


def _picture(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _figure(path: Path, caption: str) -> str:
    text = html.escape(caption)
    return (
        f'<figure><img src="{_picture(path)}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    )


def _chart(series: dict[str, tuple[list[float], list[float]]], ylabel: str) -> str:
    """Lines over training steps as inline SVG; ``series`` maps a name to (steps, values)."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs the package matplotlib: pip install 'tinyflux[report]'"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3), layout="constrained")
    for name, (steps, values) in series.items():
        axes.plot(steps, values, marker="o" if len(steps) < 20 else "", markersize=3, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue().split("?>", 1)[-1]


def _series(metrics: list[dict[str, Any]], **names: str) -> dict[str, tuple[list, list]]:
    """``label=key`` pairs to lines of those keys, without the log lines that lack them."""
    lines = {}
    for label, key in names.items():
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            lines[label.replace("_", " ")] = (list(steps), list(values))
    return lines


def _stage_rows(stages: dict[str, Any], rates: dict[str, str]) -> str:
    rows = []
    for name, stage in stages.items():
        rows.append(
            f"<tr><td>{name}<br><span class=note>{html.escape(stage['title'])}</span></td>"
            f"<td class=n>{stage['seconds']:.0f} s</td><td>{html.escape(rates.get(name, ''))}</td>"
            f"<td><code>{html.escape(stage['command'])}</code></td></tr>"
        )
    return "\n".join(rows)


def write_report(run: RunConfig) -> str:
    """Write ``report.html`` from what the stages left in the run directory.

    Raises:
        TinyFluxError: the run was not trained or not evaluated yet.
    """
    with working_copy(run.run_dir) as run_dir:
        _write_report(run_dir, run)
    return join(run.run_dir, names.REPORT)


def _write_report(run_dir: Path, run: RunConfig) -> None:
    evaluation = _read(run_dir / names.EVALUATION)
    metrics = read_metrics(run_dir / names.METRICS)
    if evaluation is None or not metrics:
        missing = names.EVALUATION if evaluation is None else names.METRICS
        raise TinyFluxError(
            f"there is no {missing} in '{run.run_dir}': train and evaluate first, or `tinyflux run`"
        )
    stages = _read(run_dir / names.STAGES) or {}
    world = _read(Path(run.zoo.vae_repo) / "world.json")
    served = _read(run_dir / names.SERVED)
    steps = max(line["step"] for line in metrics)
    nearest, losses = evaluation["nearest"], evaluation.get("held_out")
    pairs = nearest["pictures"]
    drawn, shown = (
        "".join(
            _figure(run_dir / names.EVALUATION_PICTURES / pair[kind], pair["prompt"])
            for pair in pairs
        )
        for kind in ("picture", "reference")
    )
    progress = "".join(
        f"<h3>After step {_step_of(grid)}</h3><img src='{_picture(grid)}' alt='' "
        f"style='width: {Image.open(grid).width * 2}px'>"
        for grid in sorted((run_dir / names.SAMPLES).glob("*.png"), key=_step_of)
    )
    held_out = _series(metrics, EMA_weights="val_velocity_ema", raw_weights="val_velocity")
    charts = _chart(_series(metrics, total="loss", velocity="loss_main"), "training loss")
    charts += _chart(_series(metrics, Lune="loss_lune", Sol="loss_sol"), "distillation loss")
    charts += _chart(held_out, "held-out velocity loss") if held_out else ""
    title = html.escape(f"TinyFlux run {run_dir.name}")
    toy = ""
    if world is not None:
        toy = (
            f"The frozen VAE, CLIP and teachers are a toy world that was trained beforehand (VAE: "
            f"{world['vae']['psnr_db']} dB) and ships with the package: a toy of this size and "
            f"time remembers, it does not invent."
        )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class=note>{evaluation["parameters"] / 1e6:.1f}M parameters, {steps} steps of
{run.trainer.batch_size} samples on {html.escape(evaluation["machine"])}. {toy}</p>

<div class=figures>
<div><div class=big>{nearest["trained"]["top1"]:.0%}</div>of {nearest["count"]} pictures are nearest
to their own caption's picture<br><span class=note>untrained student
{nearest["untrained"]["top1"]:.0%}, chance {1 / nearest["count"]:.0%};<br>among the five nearest:
{nearest["trained"]["top5"]:.0%} against {nearest["untrained"]["top5"]:.0%}, chance
{min(1, 5 / nearest["count"]):.0%}</span></div>
{_loss(losses)}
</div>

<h2>What it draws</h2>
<p>EMA weights, {run.sample.num_steps} steps, guidance {run.sample.guidance_scale}. The prompts are
captions that it was trained on.</p>
{drawn}
<h2>What it was shown with them</h2>
<p>The data's latents, decoded.</p>
{shown}
{_over_http(run_dir, served)}
<h2>As training went on</h2>
{progress or "<p>No samples were drawn (trainer.sample_every).</p>"}
<h2>Losses</h2>
{charts}
<h2>Stages</h2>
<table><tr><th>stage</th><th>time</th><th>rate</th><th>this stage alone</th></tr>
{_stage_rows(stages, _rates(run, stages, steps, served))}</table>
<p class=note>{html.escape(ATTRIBUTION) if world is not None else ""}</p>
</body></html>
"""
    atomic_write(run_dir / names.REPORT, page.encode())


def _read(path: Path) -> Any:
    """A JSON file, or None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def _loss(losses: dict[str, Any] | None) -> str:
    if losses is None:
        return ""
    return (
        f"<div><div class=big>{losses['trained']['val_velocity']:.3f}</div>held-out velocity loss"
        f"<br><span class=note>untrained student {losses['untrained']['val_velocity']:.3f}; "
        f"{losses['count']} samples never trained on</span></div>"
    )


def _over_http(run_dir: Path, served: dict[str, Any] | None) -> str:
    if served is None:
        return ""
    return (
        f"<h2>Over HTTP</h2><p>Ray Serve's answer to <b>{html.escape(served['prompt'])}</b>.</p>"
        f"{_figure(run_dir / names.SERVED_PICTURE, served['prompt'])}"
    )


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
