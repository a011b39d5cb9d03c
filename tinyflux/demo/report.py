"""One self-contained HTML page that shows what a demo run did."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from tinyflux.config import RunConfig
from tinyflux.toy.openmoji import ATTRIBUTION
from tinyflux.util.files import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def write_report(run: RunConfig) -> Path:
    """Write ``report.html`` from what the demo's stages left in the run directory."""
    run_dir = Path(run.run_dir)
    stages = json.loads((run_dir / "stages.json").read_text())
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    world = json.loads((Path(run.zoo.vae_repo) / "world.json").read_text())
    served = json.loads((run_dir / "served.json").read_text())
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((Path(run.cache.path) / "manifest.json").read_text())

    folder = Path(run.data.folder)
    pictures = sorted(folder.glob("*.png"))
    shown = pictures[:: max(1, len(pictures) // 40)]
    originals = "".join(_figure(p, p.with_suffix(".txt").read_text().strip()) for p in shown)

    nearest = evaluation["nearest"]
    pairs = "".join(
        _figure(run_dir / "evaluation" / pair["picture"], pair["prompt"])
        for pair in nearest["pictures"]
    )
    progress = "".join(
        f"<h3>After step {_step_of(grid)}</h3><img src='{_picture(grid)}' alt='' "
        f"style='width: {Image.open(grid).width * 2}px'>"
        for grid in sorted((run_dir / "samples").glob("*.png"), key=_step_of)
    )
    train_seconds = stages["train"]["seconds"]
    steps = max(line["step"] for line in metrics)
    rates = {
        "pictures": f"{len(pictures) / stages['pictures']['seconds']:.0f} pictures/s",
        "cache": f"{manifest['rows'] / stages['cache']['seconds']:.1f} samples/s with start-up",
        "train": f"{steps * run.trainer.batch_size / train_seconds:.0f} samples/s with start-up",
        "serve": f"{served['seconds']:.2f} s for the picture",
    }
    losses = _series(metrics, total="loss", velocity="loss_main")
    heads = _series(metrics, Lune="loss_lune", Sol="loss_sol")
    held_out = _series(metrics, EMA_weights="val_velocity_ema", raw_weights="val_velocity")
    loss = evaluation["held_out"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TinyFlux demo</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>TinyFlux demo</h1>
<p class=note>A toy: {evaluation["parameters"] / 1e6:.1f}M parameters, {run.data.width} x
{run.data.height} px, {len(pictures)} OpenMoji drawings, {steps} steps of
{run.trainer.batch_size} samples on {html.escape(evaluation["machine"])}. The frozen VAE, CLIP and
teachers were trained beforehand (VAE: {world["vae"]["psnr_db"]} dB) and ship with the package.</p>

<div class=figures>
<div><div class=big>{nearest["trained"]["top1"]:.0%}</div>of {nearest["count"]} pictures are nearest
to their own caption's drawing<br><span class=note>untrained student
{nearest["untrained"]["top1"]:.0%}, chance {1 / nearest["count"]:.0%};<br>among the five nearest:
{nearest["trained"]["top5"]:.0%} against {nearest["untrained"]["top5"]:.0%}, chance
{5 / nearest["count"]:.0%}</span></div>
<div><div class=big>{loss["trained"]["val_velocity"]:.3f}</div>held-out velocity loss<br>
<span class=note>untrained student {loss["untrained"]["val_velocity"]:.3f}; {loss["count"]}
drawings
never trained on</span></div>
</div>

<h2>What it draws</h2>
<p>EMA weights, {run.sample.num_steps} steps, guidance {run.sample.guidance_scale}. The prompts are
captions that it was trained on: a toy of this size and time remembers, it does not invent.</p>
{pairs}
<h2>What it was shown</h2>
{originals}
<h2>Over HTTP</h2>
<p>Ray Serve's answer to <b>{html.escape(served["prompt"])}</b>.</p>
{_figure(run_dir / "served.png", served["prompt"])}
<h2>As training went on</h2>
{progress}
<h2>Losses</h2>
{_chart(losses, "training loss")}{_chart(heads, "distillation loss")}
{_chart(held_out, "held-out velocity loss") if held_out else ""}
<h2>Stages</h2>
<table><tr><th>stage</th><th>time</th><th>rate</th><th>this stage alone</th></tr>
{_stage_rows(stages, rates)}</table>
<p class=note>{html.escape(ATTRIBUTION)} Pictures made here derive from theirs.</p>
</body></html>
"""
    path = run_dir / "report.html"
    atomic_write(path, page.encode())
    return path


def _step_of(grid: Path) -> int:
    """``step_00001000.png`` -> 1000."""
    digits = grid.stem.rsplit("_", 1)[-1]
    return int(digits) if digits.isdigit() else 0
