"""Does distillation help? ``python benchmarks/distillation.py [--steps N] [--seeds N]``.

Trains the toy student on all OpenMoji drawings with each arm's teachers: none, Lune, Sol, both.
In the arms that end in ``-target`` a teacher is only what the student's prediction is compared
with: the forward never sees its features, as in use. An arm changes nothing but its teachers: the
architecture, the first weights, the batches, the times and the noise of a seed are the same in
every arm. Then prints the velocity loss of pictures that no arm trained on against the step: means
over seeds, and the mean of the differences to ``none`` within a seed with its 95% t-interval. The
student is validated as it is used, with no teacher at hand; "teachers seen" is the same loss, of
the EMA weights, with the teachers' true features put in, which no prompt can bring. The last loss
is also given by time.

Settings are the demo's (configs/demo.yaml). ``--set`` changes any of them:
``--set trainer.lune_dropout=1``; a setting of a teacher that an arm has not is left alone there.
What was drawn, encoded and trained is kept in ``--work`` and used again: remove it after a change
of the code. A run takes about two minutes on one free core.

The toy teachers and the toy CLIP were trained on all of these pictures, the held-out ones too; no
arm sees a held-out picture's features while training, and every arm has the same CLIP.

Prints tables and, last, JSON.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import T5Tokenizer

from tinyflux.cache.build import build
from tinyflux.cache.config import MixSource
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.config import RunConfig, load_run_config
from tinyflux.data.batches import HeldOut
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.distributed.data import measure_sol
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents
from tinyflux.toy.openmoji import Emoji, write_picture_folder
from tinyflux.toy.world import SHIPPED
from tinyflux.trainer.checkpoint import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.evaluation import TIMES, Evaluator, InlineEvaluator
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.losses import compute_main_loss
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.prefetch import prefetch
from tinyflux.trainer.recorder import Recorder, RunPaths
from tinyflux.trainer.step import teacher_features
from tinyflux.util.config import to_dict
from tinyflux.util.files import atomic_write
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import randn_for

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
# An arm's teachers, each with its dropout: the share of samples whose forward does not see it.
# None is the run's setting.
ARMS: dict[str, dict[str, float | None]] = {
    "none": {},
    "lune": {"lune": None},
    "sol": {"sol": None},
    "both": {"lune": None, "sol": None},
    "lune-target": {"lune": 1.0},
    "sol-target": {"sol": 1.0},
    "both-target": {"lune": 1.0, "sol": 1.0},
}
METRICS = {"val_velocity": "weights", "val_velocity_ema": "EMA weights"}
# Two-sided 95% quantiles of Student's t by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Curve = dict[int, dict[str, float]]  # validation figures by step


def run_config(work: Path, arguments: argparse.Namespace) -> RunConfig:
    """The demo's run with this benchmark's places and sizes; ``--set`` has the last word."""
    world = str(SHIPPED)
    settings: dict[str, Any] = {
        "data.folder": work / "pictures",
        "zoo.vae_repo": world,
        "zoo.t5_repo": f"{world}/t5",
        "zoo.clip_repo": f"{world}/clip",
        "zoo.experts_repo": world,
        "zoo.sd_repo": world,
        "cache.path": work / "cache",
        "cache.rows_per_shard": 256,
        "cache.cpus_per_actor": 1,
        "trainer.total_steps": arguments.steps,
        "trainer.batch_size": arguments.batch_size,
        "trainer.validate_every": arguments.validate_every,
        "trainer.val_fraction": arguments.held_out,
        "trainer.save_every_steps": "null",
        "trainer.sample_every": "null",
        "trainer.log_every": 50,
    }
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    return load_run_config(DEMO, [*overrides, *(f"--{setting}" for setting in arguments.set)])


def prepare(run: RunConfig) -> CacheMixture:
    """Draw the pictures and encode them, where that is not done yet."""
    tokenizer = T5Tokenizer.from_pretrained(run.zoo.t5_repo)

    def fits(emoji: Emoji) -> bool:
        return len(tokenizer(emoji.caption).input_ids) <= run.model.max_text_length

    for _ in write_picture_folder(Path(run.data.folder), run.data.width, fits):
        pass
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build(configs, LocalRunner(configs))
    return CacheMixture([MixSource(run.cache.path)])


def arm_config(trainer: TrainerConfig, arm: str, seed: int) -> TrainerConfig:
    """The run's settings with the arm's teachers alone; the other's settings are the defaults."""
    values = {item.name: getattr(trainer, item.name) for item in fields(trainer)}
    values["seed"] = seed
    for teacher in ("lune", "sol"):
        if teacher not in ARMS[arm]:
            defaults = {n: v for n, v in vars(TrainerConfig()).items() if n.startswith(teacher)}
            values |= {**defaults, f"enable_{teacher}": False}
        elif ARMS[arm][teacher] is not None:
            values[f"{teacher}_dropout"] = ARMS[arm][teacher]
    return TrainerConfig(**values)


def train_arm(
    work: Path, dataset: CacheMixture, model_config: TinyFluxConfig, config: TrainerConfig
) -> Curve:
    """Held-out figures by step; those of a run that was done before are read."""
    said = json.dumps(
        [to_dict(model_config), to_dict(config), sorted(dataset.caches[0].keys())], sort_keys=True
    )
    folder = work / "runs" / hashlib.sha256(said.encode()).hexdigest()[:16]
    result = folder / "result.json"
    if not result.exists():
        shutil.rmtree(folder, ignore_errors=True)
        curve, model, held_out = train_student(folder, dataset, model_config, config)
        last = curve[config.total_steps]
        used = (model, held_out, config, dataset.t_buckets)
        last["seen"] = statistics.fmean(losses_by_time(*used, teachers_seen=True))
        # The mean of these is the last val_velocity_ema.
        by_time = losses_by_time(*used, teachers_seen=False)
        last |= {f"t={t:.4f}": loss for t, loss in zip(TIMES, by_time, strict=True)}
        last |= gates(model)
        atomic_write(result, json.dumps(curve, indent=2).encode())
    return {int(step): values for step, values in json.loads(result.read_text()).items()}


def train_student(
    folder: Path, dataset: CacheMixture, model_config: TinyFluxConfig, config: TrainerConfig
) -> tuple[Curve, TinyFluxDeep, HeldOut]:
    """Held-out figures by step, the student with its EMA weights, and what was held out."""
    held_out_rows = dataset.held_out(config.val_fraction)
    held_out = read_held_out(dataset, held_out_rows)
    reader = StepReader(
        dataset, held_out_rows, config.batch_size, config.gradient_accumulation, config.seed
    )
    torch.manual_seed(config.seed)
    model = TinyFluxDeep(model_config)
    if config.enable_sol and model.sol_units is not None:
        measure_sol(model.sol_units, reader)
    ema = EMA(model, config.ema_decay)
    paths = RunPaths(*(folder / name for name in ("checkpoints", "samples", "board", "metrics")))
    evaluator = Evaluator(model, ema, config, dataset.t_buckets, held_out, sampler=None)
    loop = TrainLoop(
        TorchEngine(model, config),
        config,
        TrainerState(seed=config.seed),
        ema,
        dataset.null_text,
        dataset.t_buckets,
        Recorder(config, paths, InlineEvaluator(evaluator)),
    )
    steps = prefetch(reader.steps())
    try:
        loop.run(steps)
    finally:
        steps.close()  # type: ignore[attr-defined]
    records = [record for record in read_metrics(paths.metrics) if "val_velocity" in record]
    curve = {record.pop("step"): record for record in records}
    ema.copy_to(model)
    return curve, model, held_out


@torch.no_grad()
def losses_by_time(
    model: TinyFluxDeep,
    held_out: HeldOut,
    config: TrainerConfig,
    t_buckets: torch.Tensor,
    teachers_seen: bool,
) -> list[float]:
    """The held-out velocity loss at each of validation's times, noise first.

    Args:
        teachers_seen: give the student its teachers' true features; otherwise it is as in use.
    """
    model.eval()
    sums, count = [0.0] * len(TIMES), 0
    for batch, keys in zip(held_out.batches, held_out.keys, strict=True):
        data, size = batch.latents.float(), len(batch)
        keep = torch.full((size,), teachers_seen)
        count += size
        for index, time_ in enumerate(TIMES):
            noise = torch.stack([randn_for(data.shape[1:], "validation", k, index) for k in keys])
            t = torch.full((size,), time_)
            teachers = teacher_features(batch, model.config, config, t, t_buckets)
            pred = model(
                pack_latents(flow_x_t(data, noise, t)),
                batch.t5_embeds.float(),
                batch.clip_pooled.float(),
                t,
                TinyFluxDeep.create_img_ids(size, *batch.grid),
                **teachers.seen(keep, keep),
                grid=batch.grid,
            )
            target = pack_latents(flow_velocity(data, noise))
            sums[index] += compute_main_loss(pred, target, use_huber=False).item() * size
    return [total / count for total in sums]


def gates(model: TinyFluxDeep) -> dict[str, float]:
    """How far each expert is open: Lune's share of its signal, Sol's of the prior."""
    return {
        "lune_gate": model.lune_predictor.expert_gate.sigmoid().item(),
        "sol_share": 1 - model.sol_prior.blend_gate.sigmoid().item(),
    }


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Their mean and, of two or more, half the width of its 95% t-interval."""
    found, count = {"difference": statistics.fmean(differences)}, len(differences)
    if count > 1:
        half = T_95[count - 2] * statistics.stdev(differences) / math.sqrt(count)
        found["half_width"] = half
    return found


def summary(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """By metric, step and arm: mean, spread over seeds, and the paired difference to ``none``."""
    steps = list(next(iter(curves.values()))[0])
    result: dict[str, Any] = {}
    for metric in METRICS:
        for step in steps:
            cells = result.setdefault(metric, {}).setdefault(step, {})
            none = [curve[step][metric] for curve in curves.get("none", [])]
            for arm, runs in curves.items():
                values = [curve[step][metric] for curve in runs]
                cell = {"mean": statistics.fmean(values)}
                if len(values) > 1:
                    cell["spread"] = statistics.stdev(values)
                if arm != "none" and none:
                    pairs = [a - b for a, b in zip(values, none, strict=True)]
                    cell |= interval(pairs)
                cells[arm] = cell
    return result


def print_tables(found: dict[str, Any], curves: dict[str, list[Curve]]) -> None:
    """A row a step, an arm a column: its mean, and its difference to ``none``."""
    for metric, title in METRICS.items():
        print(f"\nHeld-out velocity loss, {title}: mean; difference to none, 95% interval")
        print("   step" + "".join(f"{arm:>30}" for arm in curves))
        for step, cells in found[metric].items():
            row = f"{step:7d}"
            for cell in cells.values():
                text = f"{cell['mean']:.4f}"
                if "difference" in cell:
                    text += f"  {cell['difference']:+.4f}"
                if "half_width" in cell:
                    text += f" +- {cell['half_width']:.4f}"
                row += f"{text:>30}"
            print(row)
    print("\nAt the end: EMA velocity loss with teachers seen, and how far the gates are open")
    for arm, runs in curves.items():
        last = [list(curve.values())[-1] for curve in runs]
        figures = {name: statistics.fmean(each[name] for each in last) for name in last[0]}
        print(
            f"{arm:>7}: not seen {figures['val_velocity_ema']:.4f}  seen {figures['seen']:.4f}  "
            f"Lune's gate {figures['lune_gate']:.3f}  Sol's share {figures['sol_share']:.3f}  "
            + "  ".join(f"{n} {figures[n]:.4f}" for n in ("val_lune", "val_sol") if n in figures)
        )
        by_time = (f"{n} {loss:.3f}" for n, loss in figures.items() if n.startswith("t="))
        print(f"{'':>7}  not seen, by time: {'  '.join(by_time)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS)[:5], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(T_95) + 2))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--validate-every", type=int, default=150, help="steps")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="trainer.x=y")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    curves: dict[str, list[Curve]] = {arm: [] for arm in arguments.arms}
    with redirect_stdout(sys.stderr):
        run = run_config(arguments.work, arguments)
        dataset = prepare(run)
        for seed in range(arguments.seeds):
            for arm in arguments.arms:
                print(f"seed {seed}, {arm}", flush=True)
                config = arm_config(run.trainer, arm, seed)
                curves[arm].append(train_arm(arguments.work, dataset, run.model, config))
    held_out = int(dataset.held_out(run.trainer.val_fraction).sum())
    trained_on = len(dataset) - held_out

    found = summary(curves)
    print_tables(found, curves)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "pictures": {"trained_on": trained_on, "held_out": held_out},
        "passes": arguments.steps * arguments.batch_size / trained_on,
        "settings": arguments.set,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "seconds": round(time.monotonic() - started),
        "held_out": found,
        "runs": curves,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
