"""One worker of a training on Ray, from its start to the run's end."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from tinyflux.distributed.deepspeed import DeepSpeedEngine
from tinyflux.distributed.evaluation import build_evaluator, is_evaluated
from tinyflux.distributed.evaluator import ActorEvaluator
from tinyflux.distributed.metrics import RayMetrics
from tinyflux.distributed.mirror import Mirror
from tinyflux.distributed.result import write_result
from tinyflux.distributed.resume import (
    find_checkpoint,
    first_weights,
    prepare_ema,
    prepare_student,
)
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import TinyFluxError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.storage.remote import RemoteFolder
from tinyflux.trainer.checkpoint import Checkpoint, load_checkpoint, remove_partial
from tinyflux.trainer.engine import Engine, TorchEngine
from tinyflux.trainer.evaluation import Evaluator
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.prefetch import prefetch
from tinyflux.trainer.recorder import Recorder
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.logging import log_to_console

logger = logging.getLogger(__name__)


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's whole life.

    Args:
        settings: a :class:`TrainingJob` as plain data.
    """
    log_to_console()
    job = from_dict(TrainingJob, settings, "the training job")
    if job.folder.size(job.error_file) is not None:
        return  # restarted after a failure that no restart mends; train() raises it
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(job.workers.cpus_per_worker)))
    if not job.workers.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # About collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    with _errors_left_for_caller(job):
        _train(
            job, ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size()
        )


def _train(job: TrainingJob, device: torch.device, rank: int, world_size: int) -> None:
    """Continue the run on this worker until it is done."""
    config, main = job.trainer, rank == 0
    data = job.open_data(check_files=main)  # a thousand workers would ask about millions of files
    reader = job.open_reader(data)
    model = first_weights(job, device)
    mirror = _pulled_mirror(job) if main else None
    checkpoint = _agree_on_checkpoint(job, main)
    state = prepare_student(model, checkpoint, job, data, reader)
    engine = _build_engine(job, model)
    ema = prepare_ema(engine, config.ema_decay, checkpoint)
    del checkpoint  # its tensors

    recorder = _build_recorder(job, mirror) if main else None
    null_text = data.null_text if config.text_dropout > 0 else None
    loop = TrainLoop(engine, config, state, ema, null_text, data.t_buckets, recorder)
    steps = prefetch(reader.steps(state.samples_seen, rank, world_size))
    try:
        loop.run(steps)
    finally:
        steps.close()  # type: ignore[attr-defined]
    _, averaged = loop.whole_weights()
    if averaged is not None:
        write_result(job, model, averaged, data, state)
    if recorder is not None:
        recorder.mark_best(state.step)
    if mirror is not None:
        mirror.push()
        shutil.rmtree(job.root, ignore_errors=True)


def _pulled_mirror(job: TrainingJob) -> Mirror | None:
    """What keeps a run at a URL, whose figures are here from now on; None for one at a path."""
    if not isinstance(job.folder, RemoteFolder):
        return None
    config = job.trainer
    keep = {"step": config.keep_last_n_steps, "epoch": config.keep_last_n_epochs}
    mirror = Mirror(job.folder, job.root, keep)
    mirror.pull()
    return mirror


def _agree_on_checkpoint(job: TrainingJob, main: bool) -> Checkpoint | None:
    """What the run goes on from: the first worker chooses it, and the others read the same one."""
    found = find_checkpoint(job) if main else None
    name: str | None = broadcast_from_rank_zero(found and found.name)
    if found is not None:
        logger.info("continuing from %s/%s", job.checkpoints.location, name)
        return found.checkpoint
    if name is None:
        return None
    return load_checkpoint(job.checkpoint_directory(name), job.trainer.verify_checkpoints)


def _build_engine(job: TrainingJob, model: TinyFluxDeep) -> Engine:
    if job.workers.engine == "torch":
        return TorchEngine(model, job.trainer)
    return DeepSpeedEngine(model, job.trainer, job.workers.zero_stage, job.workers.offload)


def _build_recorder(job: TrainingJob, mirror: Mirror | None) -> Recorder:
    """The main worker's, which evaluates in a process of its own."""
    remove_partial(job.paths.checkpoints)
    evaluations = None
    if is_evaluated(job):
        evaluations = ActorEvaluator(
            partial(_evaluator, to_dict(job)),
            job.workers.evaluator_gpus if job.workers.use_gpu else 0.0,
            max(1, int(job.workers.cpus_per_worker)),
            job.workers.evaluator_seconds,
        )
    saved = mirror.push_if_reached if mirror is not None else lambda: None
    return Recorder(job.trainer, job.paths, evaluations, [RayMetrics(job.root)], saved)


def _evaluator(settings: dict[str, Any], device: torch.device) -> Evaluator:
    return build_evaluator(from_dict(TrainingJob, settings, "the training job"), device)


@contextmanager
def _errors_left_for_caller(job: TrainingJob) -> Iterator[None]:
    """Leave a user's error where the caller of ``train`` finds it."""
    try:
        yield
    except TinyFluxError as error:
        record = {"type": type(error).__name__, "message": str(error)}
        job.folder.write(job.error_file, json.dumps(record).encode())
        raise
