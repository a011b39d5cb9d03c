"""Does the student know Sol better than a constant? ``python benchmarks/sol_predictor.py``.

Trains the toy student on drawings in OpenMoji's style with Sol as its only teacher, by the real
step, and asks on held-out drawings how far its predictions of Sol's statistics and map are from
what Sol says. Their mean squared error is given over that of two constants, both of the training
drawings: the mean over drawings and times, and the mean of each time, which is the harder one,
since the predictor sees the time and the pooled caption. Below 1 it knows something of the caption.
Errors are in the spreads of each time over the training drawings.

Arms: ``standardised`` and ``as published`` (``model.sol_standardize`` on and off), and the control
``shuffled captions``: standardised, and each training drawing has another one's caption.

Then it asks what the true features are worth: the velocity loss of the same drawings, times and
noise when the student is given Sol's own features, another drawing's map, an even map, another
drawing's statistics, or nothing (its predictions, as in use).

Intervals are 95%, by resampling the held-out drawings (each drawing's mean over seeds). Everything
is of the EMA weights. Settings are the demo's; ``--set trainer.x=y`` changes any. What was drawn,
encoded and trained is kept in ``--work`` and used again. Prints JSON; ``--json`` writes it.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import add_json_option, record
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import T5Tokenizer

from tinyflux.cache.build import build
from tinyflux.cache.config import MixSource
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.cache.schema import GROUPS
from tinyflux.config import RunConfig, load_run_config
from tinyflux.data.batches import HeldOut
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import read_held_out
from tinyflux.distributed.training import Training
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.model.experts import SolUnits
from tinyflux.model.loader import load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents
from tinyflux.toy.icons import Icon, shipped_icons, write_icon_files
from tinyflux.toy.world import SHIPPED
from tinyflux.trainer.distillation import teacher_features
from tinyflux.trainer.validation import TIMES
from tinyflux.util.config import to_dict
from tinyflux.util.files import atomic_write
from tinyflux.util.predictions import flow_velocity, flow_x_t
from tinyflux.util.seeding import generator, randn_for

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
# By arm: whether Sol's features are standardised, and whether captions are the drawings' own.
ARMS = {
    "standardised": (True, True),
    "as published": (False, True),
    "shuffled captions": (True, False),
}
RESAMPLES = 10_000

# What the student is given, of Sol's own statistics and map.
Given = Callable[[Tensor, Tensor], dict[str, Tensor]]
GIVEN: dict[str, Given] = {
    "own": lambda stats, maps: {"sol_stats": stats, "sol_spatial": maps},
    "other map": lambda stats, maps: {"sol_stats": stats, "sol_spatial": maps.roll(1, 0)},
    "even map": lambda stats, maps: {
        "sol_stats": stats,
        "sol_spatial": torch.full_like(maps, 1 / maps[0].numel()),
    },
    "other statistics": lambda stats, maps: {"sol_stats": stats.roll(1, 0), "sol_spatial": maps},
    "nothing": lambda stats, maps: {},
}


class OtherCaptions(CacheMixture):
    """A cache whose training rows have their captions dealt anew among them."""

    def deal(self, held_out: Any) -> "OtherCaptions":
        trained_on = torch.from_numpy(~held_out).nonzero()[:, 0]
        order = torch.randperm(len(trained_on), generator=generator(0, "other captions"))
        self._row_of = torch.arange(len(self))
        self._row_of[trained_on] = trained_on[order]
        return self

    def read(
        self,
        indices: Sequence[int],
        as_stored: bool = False,
        groups: Collection[str] = tuple(GROUPS),
        draws: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        rows = super().read(indices, as_stored, groups, draws)
        others = self._row_of[list(indices)].tolist()
        return {**rows, **super().read(others, as_stored, set(groups) & {"text"})}


class OtherCaptionsJob(TrainingJob):
    """A training that reads :class:`OtherCaptions`."""

    def open_data(self, check_files: bool) -> CacheMixture:
        data = OtherCaptions(self.data, check_files)
        return data.deal(data.held_out(self.trainer.val_fraction))


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The demo's run with this benchmark's places and sizes; ``--set`` has the last word."""
    world, work = str(SHIPPED), arguments.work
    settings: dict[str, Any] = {
        "run_dir": work / "runs",
        "data.folder": work / "pictures",
        "zoo.vae_repo": world,
        "zoo.t5_repo": f"{world}/t5",
        "zoo.clip_repo": f"{world}/clip",
        "zoo.experts_repo": world,
        "zoo.sd_repo": world,
        "cache.path": work / "cache",
        "cache.rows_per_shard": 256,
        "trainer.enable_lune": "false",
        "trainer.total_steps": arguments.steps,
        "trainer.batch_size": arguments.batch_size,
        "trainer.validate_every": arguments.steps,
        "trainer.val_fraction": arguments.held_out,
        "trainer.save_every_steps": "null",
        "trainer.sample_every": "null",
        "trainer.log_every": 50,
    }
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    return load_run_config(DEMO, [*overrides, *(f"--{setting}" for setting in arguments.set)])


def prepare(run: RunConfig) -> CacheMixture:
    """Write the pictures and encode them, where that is not done yet."""
    tokenizer = T5Tokenizer.from_pretrained(run.zoo.t5_repo)

    def fits(icon: Icon) -> bool:
        return len(tokenizer(icon.caption).input_ids) <= run.model.max_text_length

    drawings = (icon for icon in shipped_icons() if icon.style == "OpenMoji")
    write_icon_files(Path(run.data.folder), filter(fits, drawings))
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build(configs, LocalRunner(configs))
    return CacheMixture([MixSource(run.cache.path)])


@torch.no_grad()
def look(model: TinyFluxDeep, held_out: HeldOut, constants: "Constants") -> dict[str, Tensor]:
    """Each figure for each held-out drawing, ``[n]``, the mean over the times."""
    found: dict[str, list[Tensor]] = {}
    for batch, keys in zip(held_out.batches, held_out.keys, strict=True):
        for index, time_ in enumerate(TIMES):
            data, size = batch.latents.float(), len(batch)
            noise = torch.stack([randn_for(data.shape[1:], "validation", k, index) for k in keys])
            t = torch.full((size,), time_)
            teachers = teacher_features(
                batch, model.config, constants.trainer, t, constants.t_buckets
            )
            stats, maps = teachers.sol_stats, teachers.sol_spatial
            assert stats is not None
            assert maps is not None
            given = (
                pack_latents(flow_x_t(data, noise, t)),
                batch.t5_embeds.float(),
                batch.clip_pooled.float(),
                t,
                TinyFluxDeep.create_img_ids(size, *batch.grid),
            )
            target = pack_latents(flow_velocity(data, noise))
            for name, choice in GIVEN.items():
                pred, experts = model(
                    *given, **choice(stats, maps), return_expert_pred=True, grid=batch.grid
                )
                loss = (pred - target).square().mean((-2, -1))
                found.setdefault(f"velocity, {name}", []).append(loss)
            guesses = {
                "predictor": (experts["sol_stats_pred"], experts["sol_spatial_pred"]),
                "mean of its time": constants.of_time(t),
                "mean": constants.of_all(t),
            }
            for name, (guess, guessed) in guesses.items():
                for what, error in zip(
                    ("statistics", "map"), constants.errors(guess, guessed, stats, maps, t),
                    strict=True,
                ):  # fmt: skip
                    found.setdefault(f"{what}, {name}", []).append(error)
    parts = len(TIMES)
    sizes = [len(batch) for batch in held_out.batches]
    return {name: _over_times(values, sizes, parts) for name, values in found.items()}


def _over_times(values: list[Tensor], sizes: list[int], times: int) -> Tensor:
    """``[n]`` from each batch's values at each time."""
    rows = [
        torch.stack(values[index * times : (index + 1) * times]).mean(0)
        for index in range(len(sizes))
    ]
    return torch.cat(rows)


class Constants:
    """The training drawings' means, in the cache's units, and errors in their spreads."""

    def __init__(self, trainer: Any, data: CacheMixture, held_out: Any, size: int, num_stats: int):
        self.trainer, self.t_buckets, self.held_out = trainer, data.t_buckets, held_out
        rows = torch.from_numpy(~held_out).nonzero()[:, 0].tolist()
        sol = data.read(rows, groups=("sol",))
        self.units = SolUnits(size, num_stats)
        self.units.measure(sol["sol_stats"], sol["sol_spatial"], data.t_buckets)
        self._stats = sol["sol_stats"].mean((0, 1))
        self._map = sol["sol_spatial"].mean((0, 1))

    def of_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the mean drawing has at times ``t`` ``[B]``."""
        stats, side = self._stats.new_zeros(len(t), len(self._stats)), self._map.shape
        return self.units.restore(stats, stats.new_zeros(len(t), *side), t)

    def of_all(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the mean drawing has on the mean over times."""
        return self._stats.expand(len(t), -1), self._map.expand(len(t), -1, -1)

    def errors(
        self, guess: Tensor, guessed_map: Tensor, stats: Tensor, maps: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared errors ``[B]`` of statistics and maps."""
        found, found_map = self.units.standardise(guess, guessed_map, t)
        wanted, wanted_map = self.units.standardise(stats, maps, t)
        return (
            (found - wanted).square().mean(-1),
            (found_map - wanted_map).square().mean((-2, -1)),
        )


def ratio(above: Tensor, below: Tensor) -> dict[str, float]:
    """Mean over mean, and its 95% interval by resampling the drawings."""
    rows = _resampled(len(above))
    found = (above[rows].mean(1) / below[rows].mean(1)).quantile(torch.tensor([0.025, 0.975]))
    return {
        "ratio": (above.mean() / below.mean()).item(),
        "from": found[0].item(),
        "to": found[1].item(),
    }


def difference(one: Tensor, other: Tensor) -> dict[str, float]:
    """Mean of ``one - other``, and its 95% interval by resampling the drawings."""
    pairs = one - other
    found = pairs[_resampled(len(pairs))].mean(1).quantile(torch.tensor([0.025, 0.975]))
    return {"difference": pairs.mean().item(), "from": found[0].item(), "to": found[1].item()}


def _resampled(count: int) -> Tensor:
    return torch.randint(count, (RESAMPLES, count), generator=generator(0, "bootstrap"))


def summary(figures: dict[str, Tensor]) -> dict[str, Any]:
    """An arm's errors over the constants', and its velocity losses."""
    losses: dict[str, Any] = {"own": figures["velocity, own"].mean().item()}
    for name in list(GIVEN)[1:]:
        losses[name] = {
            "loss": figures[f"velocity, {name}"].mean().item(),
            **difference(figures[f"velocity, {name}"], figures["velocity, own"]),
        }
    return {
        "error over that of": {
            baseline: {
                what: ratio(figures[f"{what}, predictor"], figures[f"{what}, {baseline}"])
                for what in ("statistics", "map")
            }
            for baseline in ("mean of its time", "mean")
        },
        "velocity loss, given": losses,
    }


def train_arm(
    work: Path, run: RunConfig, data: CacheMixture, constants: Constants, arm: str, seed: int
) -> dict[str, Tensor]:
    """An arm's figures; those of a run that was done before are read."""
    standardise, own = ARMS[arm]
    run = replace(
        run,
        model=replace(run.model, sol_standardize=standardise),
        trainer=replace(run.trainer, seed=seed),
    )
    said = json.dumps([arm, to_dict(run.model), to_dict(run.trainer)], sort_keys=True)
    folder = work / "runs" / hashlib.sha256(said.encode()).hexdigest()[:16]
    kept = folder / "figures.safetensors"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        job = (TrainingJob if own else OtherCaptionsJob).of(replace(run, run_dir=str(folder)))
        Training(job, torch.device("cpu")).run()
        model = load_model(job.final, device="cpu", dtype=torch.float32)
        held_out = read_held_out(data, constants.held_out)
        atomic_write(kept, save(look(model.eval(), held_out, constants)))
    return load_file(kept)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/sol_predictor"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="trainer.x=y")
    parser.add_argument("--machine", default=f"{platform.machine()}, {os.cpu_count()} cores")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    arms: dict[str, list[dict[str, Tensor]]] = {arm: [] for arm in arguments.arms}
    with redirect_stdout(sys.stderr):
        run = run_config(arguments)
        data = prepare(run)
        held_out_rows = data.held_out(run.trainer.val_fraction)
        constants = Constants(
            run.trainer, data, held_out_rows, run.model.sol_spatial_size, run.model.sol_num_stats
        )
        for seed in range(arguments.seeds):
            for arm in arguments.arms:
                print(f"seed {seed}, {arm}", flush=True)
                arms[arm].append(train_arm(arguments.work, run, data, constants, arm, seed))
                print(json.dumps(summary(arms[arm][-1]), indent=2), flush=True)
    result = {
        "machine": f"{arguments.machine}, torch {torch.__version__}",
        "pictures": {
            "trained_on": len(data) - int(held_out_rows.sum()),
            "held_out": len(arms[arguments.arms[0]][0]["map, predictor"]),
        },
        "settings": arguments.set,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "seconds": round(time.monotonic() - started),
        "arms": {
            arm: summary({n: torch.stack([r[n] for r in runs]).mean(0) for n in runs[0]})
            for arm, runs in arms.items()
        },
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
