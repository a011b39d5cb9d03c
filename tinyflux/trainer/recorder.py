"""What the main worker does beside stepping: it keeps and shows what a run has come to."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from tinyflux.inference.sampler import sample_path, write_samples
from tinyflux.run_dir import BEST, METRICS
from tinyflux.storage.folder import Folder, LocalFolder
from tinyflux.trainer.best import BestCheckpoint, read_best
from tinyflux.trainer.checkpoint import (
    CheckpointData,
    save_checkpoint,
)
from tinyflux.trainer.checkpoint_folder import epoch_directory, prune, step_directory
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.direction import HELD_OUT, MEASURED
from tinyflux.trainer.evaluation import Evaluation, EvaluationRequest, Evaluations
from tinyflux.trainer.meter import StepFigures
from tinyflux.trainer.metrics import MetricLog, best_record, read_metrics
from tinyflux.trainer.trackers import Tracker, open_trackers
from tinyflux.trainer.upload import MODEL_FILES, Uploader
from tinyflux.trainer.writer import BackgroundWriter
from tinyflux.util.config import to_dict
from tinyflux.util.files import full_disk_ends_run
from tinyflux.util.images import image_grid

logger = logging.getLogger(__name__)

CheckpointKind = Literal["step", "epoch"]


@dataclass
class RunPaths:
    """Where a run writes."""

    checkpoints: Path
    samples: Path
    tensorboard: Path
    metrics: Path
    best: Path

    @classmethod
    def stated(cls, config: TrainerConfig) -> "RunPaths":
        """Where ``config`` says that the plain ``Trainer`` writes."""
        return cls(
            checkpoints=Path(config.checkpoint_dir),
            samples=Path(config.sample_dir),
            tensorboard=Path(config.tensorboard_dir),
            metrics=Path(config.tensorboard_dir) / METRICS,
            best=Path(config.checkpoint_dir) / BEST,
        )


class Recorder:
    """Log lines, figures, checkpoints, uploads and pictures of a run.

    What a training loop tells it is recorded within :meth:`recording`.

    Args:
        evaluations: where the weights are looked at; without it nothing is validated or drawn.
        trackers: told the run's numbers beside those of ``config.trackers``.
        saved: called after each checkpoint, in the thread that wrote it.
        checkpoints: those that the run goes on from, where they are elsewhere than it writes them.
    """

    def __init__(
        self,
        config: TrainerConfig,
        paths: RunPaths,
        evaluations: Evaluations | None = None,
        trackers: Sequence[Tracker] = (),
        saved: Callable[[], None] = lambda: None,
        checkpoints: Folder | None = None,
    ):
        self.config, self.paths, self.evaluations = config, paths, evaluations
        there = checkpoints or LocalFolder(paths.checkpoints)
        self._best = BestCheckpoint(config.best_metric, paths.best, there)
        self._newest: dict[CheckpointKind, Path] = {}
        self._more_trackers, self._saved = trackers, saved
        self._log: MetricLog | None = None
        self._uploader: Uploader | None = None
        self._writer: BackgroundWriter | None = None

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Have everything open while a run goes on from ``step``.

        Raises:
            TrainingError: the disk is full.
            CheckpointError: a checkpoint could not be written.
        """
        with ExitStack() as stack:
            stack.enter_context(full_disk_ends_run(str(self.paths.metrics.parent)))
            stack.callback(self._close)
            self._open(step)
            yield
            if self._writer is not None:
                self._writer.wait()
            self._best.mark()
            for kind, path in self._newest.items():
                prune(path, self._keep(kind), self._best.spared)

    def _open(self, step: int) -> None:
        config, paths = self.config, self.paths
        trackers = open_trackers(
            config.trackers,
            paths.metrics.parent,
            paths.tensorboard,
            config.tracker_project,
            to_dict(config),
            step,
        )
        self._log = MetricLog(paths.metrics, [*trackers, *self._more_trackers], step)
        self._best.resume(read_metrics(paths.metrics))
        if config.hf_repo_id is not None:
            self._uploader = Uploader(config.hf_repo_id, paths.checkpoints / ".uploads")
        if config.async_checkpoints:
            self._writer = BackgroundWriter()

    def _close(self) -> None:
        # First of all: a checkpoint that is being written may still be uploaded.
        if self._writer is not None:
            self._writer.close()
        log, uploader = self._log, self._uploader
        self._log = self._uploader = self._writer = None
        if uploader is not None:
            uploader.close()
        if log is not None:
            log.close()

    @property
    def log(self) -> MetricLog:
        """The run's figures, within :meth:`recording`."""
        assert self._log is not None, "a run is recorded within Recorder.recording"
        return self._log

    def report(self, step: int, figures: StepFigures) -> None:
        """Record the steps since the last time, and say them in a line."""
        values = asdict(figures)
        seconds_left = (self.config.total_steps - step) * values.pop("seconds_per_step")
        aligned: dict[str, float] = values.pop("aligned")
        self.log.write(step, values | aligned)
        more = "".join(f"{name} {value:.4f}  " for name, value in aligned.items())
        logger.info(
            f"step {step}/{self.config.total_steps}  loss {figures.loss:.4f}  "
            f"velocity {figures.loss_main:.4f}  lune {figures.loss_lune:.4f}  "
            f"sol {figures.loss_sol:.4f}  {more}{figures.samples_per_s:.1f} samples/s  "
            f"{_clock(seconds_left)} left"
        )

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer is not None and self._writer.busy

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written; never waits."""
        if self._writer is not None:
            self._writer.check()

    def prepare_checkpoint(self) -> None:
        """Wait for what has to be there before the tensors of the next checkpoint are gathered."""
        # A run that continues from here looks at this step's weights again, but at no earlier ones.
        self.take_evaluations(wait=True)
        if self._writer is not None:
            self._writer.wait()  # before the next copies are made, so that there is one set
        self._best.mark()

    def save(self, kind: CheckpointKind, contents: CheckpointData, upload: bool) -> None:
        """Write a checkpoint, delete old ones of its ``kind``, and upload if asked.

        With ``config.async_checkpoints`` only the copies are made here; a thread does the rest.
        """
        root, state = self.paths.checkpoints, contents.state
        path = (
            step_directory(root, state.step)
            if kind == "step"
            else epoch_directory(root, state.epoch)
        )
        uploader = self._uploader if upload else None
        # All figures of earlier steps are there by now, so these names hold until it is written.
        tidy = partial(prune, path, self._keep(kind), self._best.spared)
        self._best.add(state.step, path.name)
        self._newest[kind] = path
        if self._writer is None:
            self._write(path, contents, tidy, uploader)
        else:
            self._writer.submit(partial(self._write, path, contents.snapshot(), tidy, uploader))

    def _keep(self, kind: CheckpointKind) -> int:
        config = self.config
        return config.keep_last_n_steps if kind == "step" else config.keep_last_n_epochs

    def _write(
        self,
        path: Path,
        contents: CheckpointData,
        tidy: Callable[[], None],
        uploader: Uploader | None,
    ) -> None:
        save_checkpoint(path, contents)
        tidy()
        if uploader is not None:
            there = tuple(name for name in MODEL_FILES if (path / name).exists())
            uploader.submit(path, path.name, there)
        self._saved()

    def lacks(self, request: EvaluationRequest) -> EvaluationRequest:
        """What of a ``request`` an earlier part of the run has not recorded."""
        path = sample_path(self.paths.samples, request.step)
        return EvaluationRequest(
            request.step,
            request.validate and not self.log.has(request.step, "val_velocity"),
            request.draw and not path.exists(),
            request.grid,
            request.measure and not self.log.has(request.step, f"{MEASURED}kid"),
        )

    def evaluate(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        """Have the whole weights and the whole EMA looked at."""
        if self.evaluations is not None:
            self.evaluations.submit(request, weights, shadow)

    def take_evaluations(self, wait: bool = False) -> None:
        """Record the evaluations that are done; with ``wait`` all that were asked for."""
        if self.evaluations is not None:
            for evaluation in self.evaluations.take(wait):
                self._record(evaluation)
        self.check()
        if not self.writing:
            self._best.mark()

    def _record(self, evaluation: Evaluation) -> None:
        step, values, images = evaluation.step, evaluation.values, evaluation.images
        if values:
            self.log.write(step, values)
            self._best.consider(step, values)
        for prefix, what in ((HELD_OUT, "held out"), (MEASURED, "drawn")):
            said = [f"{name.removeprefix(prefix)} {value:.4f}"
                    for name, value in values.items() if name.startswith(prefix)]  # fmt: skip
            if said:
                logger.info("step %d  %s: %s", step, what, "  ".join(said))
        if images is not None:
            path = write_samples(images, self.config.sample_prompts, self.paths.samples, step)
            self.log.picture(step, "samples", image_grid(images))
            logger.info("step %d  samples: %s", step, path)

    def mark_best(self, final_step: int) -> None:
        """Say at which step the EMA was best, and which checkpoint is marked, if that is known."""
        best = best_record(read_metrics(self.paths.metrics))
        if best is not None:
            logger.info(
                "the EMA was best at step %d: held-out velocity %.4f; final is of step %d",
                best["step"], best["val_velocity_ema"], final_step,
            )  # fmt: skip
        marked = read_best(self.paths.best)
        if marked is not None:
            logger.info(
                "the best checkpoint by %s is %s: %.5g",
                marked.metric, marked.checkpoint, marked.value,
            )  # fmt: skip


def _clock(seconds: float) -> str:
    """``5025`` -> ``"1:23:45"``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
