"""A run from where it stands to its end, in one process or as one worker of many."""

import logging
import shutil
from collections.abc import Sequence
from itertools import islice

import torch
from torch import nn

from tinyflux.data.growing import GrowingReader
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.passes import NO_PASSES
from tinyflux.data.reader import StepReader
from tinyflux.distributed.evaluation import build_local_evaluator, is_evaluated
from tinyflux.distributed.first_weights import AnyPlace
from tinyflux.distributed.mirror import Mirror
from tinyflux.distributed.result import write_result
from tinyflux.distributed.resume import (
    check_same_growth,
    find_checkpoint,
    first_weights,
    prepare_ema,
    prepare_module,
    prepare_power_ema,
    prepare_student,
)
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.model.model import TinyFluxDeep
from tinyflux.run_dir import PASSES
from tinyflux.storage.remote import RemoteFolder
from tinyflux.trainer.checkpoint import Checkpoint, load_checkpoint
from tinyflux.trainer.checkpoint_folder import remove_partial
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine, TorchEngine
from tinyflux.trainer.evaluation import Evaluations, InlineEvaluator
from tinyflux.trainer.init_from import WeightsFile, find_weights
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.recorder import Recorder
from tinyflux.trainer.trackers import Tracker

logger = logging.getLogger(__name__)


class Training:
    """Continues a run until it is done, alone and in plain torch.

    Workers that train together override what they do together.

    Args:
        device: where this process trains.
        rank: of this worker; 0 is the main one, which records and writes. world_size: workers.
    """

    def __init__(self, job: TrainingJob, device: torch.device, rank: int = 0, world_size: int = 1):
        self.job, self.device = job, device
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0

    def tell_all(self, name: str | None) -> str | None:
        """What the main worker says, on every worker."""
        return name

    def build_engine(self, module: nn.Module) -> Engine:
        """What runs the steps of the student, or of it and its projectors."""
        return TorchEngine(module, self.job.trainer)

    def build_evaluations(self, model: TinyFluxDeep, ema: EMA, data: CacheMixture) -> Evaluations:
        """Where the main worker has its weights looked at: here, while training waits."""
        return InlineEvaluator(build_local_evaluator(self.job, model, ema, data))

    def trackers(self) -> Sequence[Tracker]:
        """Who is told the run's numbers, beside those of its settings."""
        return ()

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, and write what the run leaves."""
        job, config = self.job, self.job.trainer
        mirror = self._pull_mirror() if self.is_main else None
        checkpoint = self._agree_on_checkpoint()
        data, reader = self._open_data(checkpoint)
        model = first_weights(job, self.device)
        needed = checkpoint is None or config.adapter is not None
        first = self._agree_on_first_weights() if needed else None
        state = prepare_student(model, checkpoint, first, job, data, reader)
        engine = self.build_engine(prepare_module(model, checkpoint, config))
        ema = prepare_ema(engine, config.ema_decay, checkpoint)
        power_ema = prepare_power_ema(engine, config, checkpoint)
        del checkpoint  # its tensors

        recorder = self._build_recorder(model, ema, data, mirror) if self.is_main else None
        null_text = data.null_text if config.text_dropout > 0 else None
        loop = TrainLoop(engine, config, state, ema, null_text, data.t_buckets, recorder, power_ema)
        steps = reader.steps(state.samples_seen, self.rank, self.world_size)
        # Nothing is read, or decided of a pass, that is not trained on.
        loop.run(islice(steps, max(0, config.total_steps - state.step)))
        _, averaged = loop.whole_weights()
        if averaged is not None:
            write_result(job, model, averaged, reader.data, state)
        if recorder is not None:
            recorder.mark_best(state.step)
        if mirror is not None:
            mirror.push()
            shutil.rmtree(job.root, ignore_errors=True)

    def _open_data(
        self, checkpoint: Checkpoint | None
    ) -> tuple[CacheMixture, StepReader | GrowingReader]:
        """What the run is validated on, the held-out rows of it, and what reads its samples."""
        job = self.job
        if checkpoint is not None:
            check_same_growth(checkpoint.state, job.trainer, job.run_dir)
        if job.trainer.start_at_rows is None:
            # A thousand workers would ask about millions of files.
            data = job.open_data(check_files=self.is_main)
            return data, job.open_reader(data)
        passes = NO_PASSES if checkpoint is None else checkpoint.state.passes
        reader = job.open_growing_reader(passes, True) if self.is_main else None
        # The main worker has written what the others read.
        self.tell_all(None if reader is None else PASSES)
        reader = reader or job.open_growing_reader(passes, False)
        return reader.first, reader

    def _pull_mirror(self) -> Mirror | None:
        """What keeps a run at a URL, whose figures are here from now on; None for a path."""
        job, config = self.job, self.job.trainer
        if not isinstance(job.folder, RemoteFolder):
            return None
        keep = {"step": config.keep_last_n_steps, "epoch": config.keep_last_n_epochs}
        mirror = Mirror(job.folder, job.root, keep)
        mirror.pull()
        return mirror

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        """What the run goes on from: the main worker chooses it, and others read the same one."""
        job = self.job
        found = find_checkpoint(job) if self.is_main else None
        name = self.tell_all(None if found is None else found.name)
        if found is not None:
            logger.info("continuing from %s/%s", job.checkpoints.location, name)
            return found.checkpoint
        if name is None:
            return None
        return load_checkpoint(job.checkpoint_directory(name), job.trainer.verify_checkpoints)

    def _agree_on_first_weights(self) -> WeightsFile | None:
        """What the run began with: the main worker finds it, and others read the same file."""
        config = self.job.trainer
        if config.init_from is None:
            return None
        found = None
        if self.is_main:
            found = find_weights(config.init_from, config.init_from_ema, AnyPlace())
        told = self.tell_all(None if found is None else found.to_json())
        return None if told is None else WeightsFile.from_json(told)

    def _build_recorder(
        self, model: TinyFluxDeep, ema: EMA, data: CacheMixture, mirror: Mirror | None
    ) -> Recorder:
        job = self.job
        remove_partial(job.paths.checkpoints)
        evaluations = self.build_evaluations(model, ema, data) if is_evaluated(job) else None
        saved = mirror.push_if_reached if mirror is not None else lambda: None
        return Recorder(
            job.trainer, job.paths, evaluations, self.trackers(), saved, job.checkpoints
        )
