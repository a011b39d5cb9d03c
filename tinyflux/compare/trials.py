"""A comparison's trials on the cluster: Ray Tune runs a few at a time, each a run as any other.

What is finished is not run again, and a trial that was stopped goes on from its checkpoint, because
that is what a training does with what it finds in its directory.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from ray import tune
from ray.tune.logger import JsonLoggerCallback

from tinyflux import run_dir as names
from tinyflux.cache.build import build
from tinyflux.cache.job import BuildConfigs
from tinyflux.compare.config import CompareConfig, Trial
from tinyflux.config import RunConfig, keep_run_config, kept_run_config
from tinyflux.distributed.build import RayRunner
from tinyflux.distributed.ray_session import ensure_ray
from tinyflux.distributed.relay import pack_error, unpack_error
from tinyflux.distributed.result import is_finished
from tinyflux.distributed.run_lock import wait_until_free
from tinyflux.distributed.train import ray_storage, train
from tinyflux.distributed.train_local import train_local
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import ConfigError, TinyFluxError, TrainingError
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.metrics import parse_metrics
from tinyflux.util.config import from_dict, nearest, to_dict
from tinyflux.util.logging import LIBRARY, log_to_console
from tinyflux.util.machine import describe_machine
from tinyflux.util.text import duration, last_line

# A killed comparison's trials may still be ending.
FREE_SECONDS = 120.0
# What a trial's figures follow from. How many trials run at a time, or where Ray has room, is not.
DECIDING = ("model", "trainer", "data", "zoo", "cache", "mix")
MEASURING = ("evaluate", "sample")  # if pictures are measured beside training
# Tune's own tables and TensorBoard's files of every trial: a run has its own.
QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}

logger = logging.getLogger(__name__)


def build_caches(trials: Sequence[Trial]) -> None:
    """Build each cache that trials share, once; those that a run mixes are there already."""
    runs = {trial.run.cache.path: trial.run for trial in reversed(trials) if not trial.run.mix}
    for run in runs.values():
        configs = BuildConfigs.begin(run.data, run.zoo, run.cache, run.model)
        build(configs, RayRunner(configs))


def run_trials(config: CompareConfig, trials: Sequence[Trial]) -> None:
    """Train every trial that is not finished.

    Raises:
        ConfigError: a trial's directory holds a run of other settings.
        TinyFluxError: what a user can mend, of the first trial that met it; the others are stopped.
        TrainingError: trials that died more often than ``max_failures``.
    """
    for trial in trials:
        check_same_run(trial)
    left = [trial for trial in trials if not is_finished(TrainingJob.of(trial.run))]
    if len(left) < len(trials):
        logger.info("%d of %d trials are finished", len(trials) - len(left), len(trials))
    if left:
        _tune(config, left)
    for trial in trials:  # finished ones may have been trained for another metric
        check_recorded(trial.run, [config.metric, *config.metrics])


def check_same_run(trial: Trial) -> None:
    """Refuse to count what other settings left in a trial's directory; ConfigError."""
    before, now = kept_run_config(trial.run.run_dir), trial.run
    if before is None:
        return
    for section in (*DECIDING, *(MEASURING if now.trainer.evaluate_every else ())):
        was, is_now = getattr(before, section), getattr(now, section)
        if was != is_now:
            raise ConfigError(
                f"the trial in {trial.run.run_dir} was begun with other settings "
                f"({_first_difference(section, was, is_now)}): remove it, or set another `output`"
            )


def _first_difference(section: str, before: object, now: object) -> str:
    """``trainer.learning_rate = 0.1, now 0.2``, or the section's name where it is a list."""
    if isinstance(before, list) or isinstance(now, list):
        return section
    for item in fields(before):  # type: ignore[arg-type]
        was, is_now = getattr(before, item.name), getattr(now, item.name)
        if was != is_now:
            return f"{section}.{item.name} = {was!r:.60}, now {is_now!r:.60}"
    return section


def _tune(config: CompareConfig, trials: Sequence[Trial]) -> None:
    """Let Ray Tune run the trials."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ensure_ray()
    metrics = [config.metric, *config.metrics]
    space = [{"name": one.name, "run": to_dict(one.run), "metrics": metrics} for one in trials]
    tuner = tune.Tuner(
        tune.with_resources(_train_trial, _resources),
        param_space={"trial": tune.grid_search(space)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.concurrent,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"trials-{time.strftime('%Y%m%d-%H%M%S')}",
            **ray_storage(open_folder(config.output)),
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            stop=_UntilError(),
            callbacks=[_Progress(len(trials)), JsonLoggerCallback()],  # Tune reads its files
            verbose=0,
        ),
    )
    grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    for result in results:
        if packed := (result.metrics or {}).get("error"):
            raise unpack_error(packed)
    failed = [result for result in results if result.error is not None]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(trials)} trials stopped, the first with "
            f"{last_line(failed[0].error)}; the same command goes on with them"
        )
    if missing := [one.name for one in trials if not is_finished(TrainingJob.of(one.run))]:
        raise TrainingError(
            f"{len(missing)} trials are not finished, the first of them {missing[0]}: the same "
            "command goes on with them"
        )


class _UntilError(tune.Stopper):
    """Stops all trials when one has met a user's error, which every other would meet."""

    def __init__(self) -> None:
        self._met = False

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        self._met = self._met or bool(result.get("error"))
        return self._met

    def stop_all(self) -> bool:
        return self._met


class _Progress(tune.Callback):
    """A line for each trial that is done."""

    def __init__(self, total: int):
        self._total, self._done, self._begun = total, 0, time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._done += 1
        seconds = time.monotonic() - self._begun
        logger.info(
            f"{trial.config['trial']['name']} is done: {self._done} of {self._total} trials, "
            f"{duration(seconds)} so far"
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        logger.warning("%s has failed", trial.config["trial"]["name"])


def _name(trial: Any) -> str:
    name: str = trial.config["trial"]["name"]
    return name.replace("/", "-")


def _resources(space: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """What a trial takes of the cluster; Ray Train asks for the workers of its own jobs."""
    workers = from_dict(RunConfig, space["trial"]["run"], "the trial").workers
    if workers.num_workers > 1:
        return tune.PlacementGroupFactory([{"CPU": 0.001}])
    bundle = {"CPU": workers.cpus_per_worker}
    if workers.use_gpu:
        bundle["GPU"] = 1.0
    return tune.PlacementGroupFactory([bundle])


def _train_trial(space: Mapping[str, Any]) -> None:
    """Train one trial, in a process of Ray Tune's.

    A user's error is reported as a result, because Tune would try it again.
    """
    trial = space["trial"]
    run = from_dict(RunConfig, trial["run"], "the trial")
    log_to_console()
    logging.getLogger(LIBRARY).setLevel(logging.WARNING)  # many trials at once
    torch.set_num_threads(max(1, int(run.workers.cpus_per_worker)))
    try:
        wait_until_free(run.run_dir, FREE_SECONDS)
        work: Callable[..., str] = train if run.workers.num_workers > 1 else train_local
        work(run, begin=lambda: _begin(run))
        check_recorded(run, trial["metrics"])
    except TinyFluxError as error:
        tune.report({"error": pack_error(error)})
    else:
        tune.report({"error": ""})


def _begin(run: RunConfig) -> None:
    """Note what is trained, and where."""
    keep_run_config(run)
    hardware = {"machine": describe_machine(), "threads": torch.get_num_threads()}
    open_folder(run.run_dir).write(names.HARDWARE, json.dumps(hardware).encode())


def check_recorded(run: RunConfig, metrics: Sequence[str]) -> None:
    """Refuse metrics that a finished run has no record of; ConfigError."""
    records = parse_metrics(open_folder(run.run_dir).read(names.METRICS))
    known = {name for record in records for name in record} - {"step"}
    for name in metrics:
        if name not in known:
            raise ConfigError(
                f"metric '{name}' is not recorded by {run.run_dir}{nearest(name, known)}: there "
                f"are {', '.join(sorted(known))}"
            )
