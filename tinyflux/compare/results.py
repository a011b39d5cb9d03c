"""From the runs of finished trials to the record of a comparison."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyflux import run_dir as names
from tinyflux.cache.config import MixSource
from tinyflux.compare.analysis import compare
from tinyflux.compare.config import BASE, CompareConfig, Trial, as_typed, trial_place
from tinyflux.compare.record import (
    ArmRecord,
    CompareRecord,
    Comparison,
    Curve,
    TrialRecord,
)
from tinyflux.config import RunConfig
from tinyflux.data.mixture import CacheMixture
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.metrics import parse_metrics


def make_record(
    name: str, config: CompareConfig, trials: Sequence[Trial], stages: Mapping[str, float]
) -> CompareRecord:
    """The record of a comparison whose trials are finished."""
    metrics = list(dict.fromkeys([config.metric, *config.metrics]))
    found = [_trial_record(config, trial, metrics) for trial in trials]
    run = trials[0].run
    rows, held_out = _count_rows(run)
    controls = config.control_of
    return CompareRecord(
        name=name,
        metric=config.metric,
        metrics=metrics,
        lower_is_better=config.lower_is_better_of(config.metric),
        seeds=list(config.seeds),
        steps=run.trainer.total_steps,
        batch_size=run.trainer.batch_size,
        base=config.base,
        settings=_said(config.settings),
        rows=rows - held_out,
        held_out=held_out,
        arms=[
            ArmRecord(
                name=arm,
                settings=_said(config.arms.get(arm, {})),
                control_of=controls.get(arm),
                seed_offset=config.seed_offset.get(arm, 0),
            )
            for arm in config.names
        ],
        trials=found,
        comparisons=_comparisons(config, found, metrics),
        stages={stage: round(seconds, 1) for stage, seconds in stages.items()},
    )


def _said(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: as_typed(value) for name, value in settings.items()}


def _count_rows(run: RunConfig) -> tuple[int, int]:
    """Samples of the run's data, and how many of them are held out."""
    data = CacheMixture(list(run.mix) or [MixSource(run.cache.path)])
    return len(data), int(data.held_out(run.trainer.val_fraction).sum())


def _trial_record(config: CompareConfig, trial: Trial, metrics: Sequence[str]) -> TrialRecord:
    folder, trainer = open_folder(trial.run.run_dir), trial.run.trainer
    records = parse_metrics(folder.read(names.METRICS))
    hardware = json.loads(folder.read(names.HARDWARE))
    return TrialRecord(
        arm=trial.arm,
        seed=trial.seed,
        run_seed=trainer.seed,
        run_dir=trial_place(trial.arm, trial.seed),
        seconds=round(float(seconds_at(records, trainer.batch_size, [trainer.total_steps])[0]), 3),
        curves={metric: read_curve(records, metric, trainer.batch_size) for metric in metrics},
        **hardware,
    )


def read_curve(records: Sequence[Mapping[str, Any]], metric: str, batch_size: int) -> Curve:
    """A run's metric by step and by seconds of training."""
    having = sorted((one for one in records if metric in one), key=lambda one: int(one["step"]))
    steps = [int(record["step"]) for record in having]
    seconds = seconds_at(records, batch_size, steps)
    return Curve(
        steps, [round(float(one), 3) for one in seconds], [_finite(one[metric]) for one in having]
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def seconds_at(
    records: Sequence[Mapping[str, Any]], batch_size: int, steps: Sequence[int]
) -> np.ndarray:
    """``[N]``: seconds of training until each of ``steps``, from the rates that a run recorded.

    A rate covers the steps since the one before it, and counts training and the wait for its data
    alone. After the last one, and between two, the time goes on evenly.
    """
    rated = {int(one["step"]): one["samples_per_s"] for one in records if one.get("samples_per_s")}
    known, total, rate = [(0, 0.0)], 0.0, math.inf
    for step in sorted(rated):
        rate = rated[step]
        total += (step - known[-1][0]) * batch_size / rate
        known.append((step, total))
    last = max([*steps, known[-1][0]])
    known.append((last, total + (last - known[-1][0]) * batch_size / rate))
    return np.interp(steps, [step for step, _ in known], [second for _, second in known])


def _comparisons(
    config: CompareConfig, trials: Sequence[TrialRecord], metrics: Sequence[str]
) -> list[Comparison]:
    def curves(arm: str, metric: str) -> list[Curve]:
        return [trial.curves[metric] for trial in trials if trial.arm == arm]

    offsets = {BASE: 0, **dict.fromkeys(config.arms, 0), **config.seed_offset}
    return [
        compare(
            arm,
            to,
            metric,
            curves(arm, metric),
            curves(to, metric),
            config.lower_is_better_of(metric),
            paired=offsets[arm] == offsets[to],
        )
        for metric in metrics
        for arm, to in config.pairs
    ]


def to_json(record: CompareRecord) -> str:
    """The record as a file holds it."""
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"
