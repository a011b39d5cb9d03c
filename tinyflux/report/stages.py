"""A run's stages one after another, each as the command that a user would type.

A stage that finished is not run again; one that was stopped continues, because every stage's own
command continues from what it finds.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinyflux import run_dir
from tinyflux.config import RunConfig, keep_run_config, parse_run_config, stage_names
from tinyflux.distributed.result import read_result
from tinyflux.errors import TinyFluxError, TrainingError
from tinyflux.storage.remote import open_folder
from tinyflux.util.config import to_dict
from tinyflux.util.processes import child_process
from tinyflux.util.urls import join

# Stages tell their progress themselves; no library's bars or requests between their lines.
QUIET = {"TQDM_DISABLE": "1", "RAY_SERVE_LOG_TO_STDERR": "0"}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its key in ``stages.json``.
        title: what it does, for people.
        command: arguments after ``python``; what the report says to type for this stage alone.
        run: does it; None means running ``command``.
    """

    name: str
    title: str
    command: list[str]
    run: Callable[["Stage"], None] | None = None

    @property
    def shell(self) -> str:
        """The command as typed in the root of a checkout."""
        return shlex.join([".venv/bin/python", *self.command])


class StageFailed(TinyFluxError):
    """A stage's command ended with an error, which it has printed itself."""


def main_stages(config: Sequence[str], local: bool = False) -> dict[str, Stage]:
    """What every run has, by name: ``config`` is ``--config FILE`` and overrides.

    Args:
        local: cache and train without Ray.
    """
    tinyflux = ["-m", "tinyflux"]
    here = ["--local"] if local else []
    found = [
        Stage(
            "cache",
            f"encode pictures, captions and teacher features {_where('Ray Data', local)}",
            [*tinyflux, "cache", "build", *here, *config],
        ),
        Stage(
            "train",
            f"train the student {_where('Ray Train and DeepSpeed', local)}",
            [*tinyflux, "train", *here, *config],
        ),
        Stage(
            "evaluate",
            "measure how well pictures follow prompts, against an untrained student",
            [*tinyflux, "evaluate", *config],
        ),
        Stage("report", "write the report", [*tinyflux, "report", *config]),
    ]
    return {stage.name: stage for stage in found}


def _where(ray: str, local: bool) -> str:
    return "in one process" if local else f"with {ray}"


def run_file(arguments: Sequence[str], local: bool = False) -> str:
    """Cache, train, evaluate and report as one run file says; the report's path.

    Of a file with ``stages`` each is cached and trained, below the run's directory, and the last is
    evaluated and reported.

    Args:
        arguments: the file and overrides.
        local: cache and train without Ray.

    Raises:
        StageFailed: a stage's command failed; what went wrong has been printed by it.
        TrainingError: a stage began with weights that the one before has no more.
    """
    if not arguments or arguments[0].startswith("-"):
        raise TinyFluxError("say which run: tinyflux run FILE [--section.key VALUE]")
    config = ["--config", arguments[0], *arguments[1:]]
    run = parse_run_config(config, "tinyflux run FILE", whole=True)
    keep_run_config(run)
    names = stage_names(run)
    for number, name in enumerate(names, start=1):
        here = [*config, "--stage", name]
        run = parse_run_config(here, "tinyflux run FILE")
        logger.info("\nstage %s (%d of %d): %s", name, number, len(names), run.run_dir)
        check_first_weights(run)
        if number < len(names):
            steps = main_stages(here, local)
            run_stages([steps["cache"], steps["train"]], run, Path.cwd())
    last = [*config, *(("--stage", names[-1]) if names else ())]
    run_stages(list(main_stages(last, local).values()), run, Path.cwd())
    return join(run.run_dir, run_dir.REPORT)


def check_first_weights(run: RunConfig) -> None:
    """Refuse a finished training whose first weights are no more those that it would begin with.

    Raises:
        TrainingError: the training that it began with has gone on since.
    """
    source = run.trainer.init_from
    began = read_result(open_folder(run.run_dir)).get("init_from", {})
    if source is None or began.get("source") != source:
        return
    files = read_result(open_folder(source)).get("files", {})
    if files and began.get("sha256") not in files.values():
        raise TrainingError(
            f"the training in {run.run_dir} began with weights that {source} has no more: delete "
            f"{run.run_dir} to train it from those that are there"
        )


def run_stages(stages: Sequence[Stage], run: RunConfig, root: Path) -> None:
    """Run every stage that has not run yet with these settings, in ``root``."""
    folder = open_folder(run.run_dir)
    try:
        record: dict[str, Any] = json.loads(folder.read(run_dir.STAGES))
    except FileNotFoundError:
        record = {}
    settings = hashlib.sha256(json.dumps(to_dict(run), sort_keys=True).encode()).hexdigest()
    redo = False
    for number, stage in enumerate(stages, start=1):
        done = record.get(stage.name)
        heading = f"[{number}/{len(stages)}] {stage.name}: {stage.title}"
        if done and done["settings"] == settings and not redo:
            logger.info("%s - done before in %.0f s", heading, done["seconds"])
            continue
        redo = True  # what follows was made from what this stage made
        logger.info("\n%s\n$ %s", heading, stage.shell)
        begun = time.monotonic()
        if stage.run is None:
            _call(stage, root)
        else:
            stage.run(stage)
        record[stage.name] = {
            "title": stage.title,
            "command": stage.shell,
            "seconds": round(time.monotonic() - begun, 1),
            "settings": settings,
        }
        folder.write(run_dir.STAGES, (json.dumps(record, indent=2) + "\n").encode())


def _call(stage: Stage, root: Path) -> None:
    command = [sys.executable, *stage.command]
    with child_process(command, root, {**os.environ, **QUIET}) as child:
        code = child.wait()
    if code:
        raise StageFailed(
            f"the stage '{stage.name}' ended with exit code {code}, see above; "
            f"the same command continues from here"
        )
