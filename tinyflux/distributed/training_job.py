"""A training run as its processes know it: its settings, and where it is written."""

import hashlib
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tinyflux import run_dir as names
from tinyflux.cache.config import CacheConfig, MixSource
from tinyflux.data.growing import GrowingReader, open_first
from tinyflux.data.ledger import Ledger
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.passes import Passes
from tinyflux.data.reader import StepReader
from tinyflux.distributed.config import SampleConfig, WorkersConfig
from tinyflux.evaluation.config import EvaluateConfig
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.storage.copies import fetch, local_directory
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.recorder import RunPaths
from tinyflux.util.urls import is_url, join


class TrainRun(Protocol):
    """What a training reads of a RunConfig."""

    run_dir: str
    cache: CacheConfig
    mix: list[MixSource]
    model: TinyFluxConfig
    trainer: TrainerConfig
    workers: WorkersConfig
    zoo: ZooConfig
    evaluate: EvaluateConfig
    sample: SampleConfig


@dataclass
class TrainingJob:
    """What every process of a training is told, as plain data between them.

    Attributes:
        run_dir: the run's directory, a path or a URL.
        data: the caches to train on, one or a mixture.
        model: the student's architecture; ``trainer``, ``workers`` and ``zoo`` are the run's.
        attempt: names this start of the run.
        evaluate: what pictures are measured by beside training; ``sample`` says how they are drawn.
    """

    run_dir: str
    data: list[MixSource]
    model: TinyFluxConfig
    trainer: TrainerConfig
    workers: WorkersConfig
    zoo: ZooConfig
    attempt: str
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @classmethod
    def of(cls, run: TrainRun) -> "TrainingJob":
        """A new start of ``run``."""
        return cls(
            run_dir=run.run_dir if is_url(run.run_dir) else os.path.abspath(run.run_dir),
            data=list(run.mix) or [MixSource(run.cache.path)],
            model=run.model,
            trainer=run.trainer,
            workers=run.workers,
            zoo=run.zoo,
            attempt=f"train-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            evaluate=run.evaluate,
            sample=run.sample,
        )

    @cached_property
    def folder(self) -> Folder:
        """The run's, at its path or URL."""
        return open_folder(self.run_dir)

    @cached_property
    def checkpoints(self) -> Folder:
        """That of the run's checkpoints, at its path or URL."""
        return open_folder(join(self.run_dir, names.CHECKPOINTS))

    def checkpoint_directory(self, name: str) -> Path:
        """Where the checkpoint ``name`` is on this machine; fetched if it is at a URL."""
        return Path(fetch(join(self.run_dir, f"{names.CHECKPOINTS}/{name}")))

    @property
    def root(self) -> Path:
        """Where the main worker writes: the run's directory, or for a URL one of this machine."""
        if not is_url(self.run_dir):
            return Path(self.run_dir)
        own = hashlib.sha256(self.run_dir.encode()).hexdigest()[:16]
        return local_directory() / "runs" / own / self.folder.name

    @property
    def final(self) -> Path:
        """The finished student's directory, where the main worker writes it."""
        return self.root / names.FINAL

    @property
    def error_file(self) -> str:
        """The path in ``folder`` of the error that ended a worker of this start."""
        return f"{names.RAY}/{self.attempt}.error.json"

    @property
    def paths(self) -> RunPaths:
        """The run directory's layout; it stands in for the trainer's own paths."""
        return RunPaths(
            checkpoints=self.root / names.CHECKPOINTS,
            samples=self.root / names.SAMPLES,
            tensorboard=self.root / names.TENSORBOARD,
            metrics=self.root / names.METRICS,
            best=self.root / names.BEST,
        )

    @property
    def teaches_lune(self) -> bool:
        """Whether the student learns from the teacher Lune."""
        return self.trainer.enable_lune and self.model.use_lune_expert

    @property
    def teaches_sol(self) -> bool:
        """Whether the student learns from the teacher Sol."""
        return self.trainer.enable_sol and self.model.use_sol_prior

    def open_data(self, check_files: bool) -> CacheMixture:
        """The caches, checked against the model; of growing ones what the run began with."""
        rows = self.trainer.start_at_rows
        if rows is None:
            data = CacheMixture(self.data, check_files)
        else:
            data = open_first(self.data, Ledger(self.folder).load(), check_files, rows)
        data.check(self.model, self.teaches_lune, self.teaches_sol)
        return data

    def open_reader(self, data: CacheMixture) -> StepReader:
        """What reads the run's samples, those held out apart."""
        config = self.trainer
        return StepReader(
            data,
            data.held_out(config.val_fraction),
            config.batch_size,
            config.gradient_accumulation,
            config.seed,
        )

    def open_growing_reader(self, passes: Passes, is_main: bool) -> GrowingReader:
        """What reads the run's samples from caches that grow, as ``trainer.start_at_rows`` asks.

        Args:
            passes: those that the run's checkpoint knows.
            is_main: whether this worker decides what later ones read.
        """
        config = self.trainer
        reader = GrowingReader(
            self.data,
            config.val_fraction,
            config.batch_size,
            config.gradient_accumulation,
            config.seed,
            config.start_at_rows or 1,
            Ledger(self.folder),
            passes,
            is_main,
            check_files=is_main,
        )
        reader.first.check(self.model, self.teaches_lune, self.teaches_sol)
        return reader
