"""One worker of a training on Ray."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import nn

from tinyflux.data.mixture import CacheMixture
from tinyflux.distributed.deepspeed import DeepSpeedEngine
from tinyflux.distributed.evaluation import build_evaluator
from tinyflux.distributed.evaluator import ActorEvaluator
from tinyflux.distributed.metrics import RayMetrics
from tinyflux.distributed.relay import pack_error
from tinyflux.distributed.training import Training
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import TinyFluxError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine
from tinyflux.trainer.evaluation import Evaluations, Evaluator
from tinyflux.trainer.trackers import Tracker
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.logging import LIBRARY


class RayTraining(Training):
    """A training whose workers Ray Train started, and which is evaluated in an actor."""

    def tell_all(self, name: str | None) -> str | None:
        """See :meth:`Training.tell_all`."""
        told: str | None = broadcast_from_rank_zero(name)
        return told

    def build_engine(self, module: nn.Module) -> Engine:
        """See :meth:`Training.build_engine`."""
        workers = self.job.workers
        if workers.engine == "torch":
            return super().build_engine(module)
        return DeepSpeedEngine(module, self.job.trainer, workers.zero_stage, workers.offload)

    def build_evaluations(self, model: TinyFluxDeep, ema: EMA, data: CacheMixture) -> Evaluations:
        """Where the weights are looked at: in a process of its own, from copies."""
        workers = self.job.workers
        return ActorEvaluator(
            partial(_evaluator, to_dict(self.job)),
            workers.evaluator_gpus if workers.use_gpu else 0.0,
            max(1, int(workers.cpus_per_worker)),
            workers.evaluator_seconds,
        )

    def trackers(self) -> Sequence[Tracker]:
        """Ray's dashboard and Prometheus."""
        return [RayMetrics(self.job.root)]


def train_worker(settings: dict[str, Any]) -> None:
    """One worker's whole life.

    Args:
        settings: a :class:`TrainingJob` as plain data.
    """
    # Ray Train shows what a worker logs; a handler of ours would write each line again.
    logging.getLogger(LIBRARY).setLevel(logging.INFO)
    job = from_dict(TrainingJob, settings, "the training job")
    if job.folder.size(job.error_file) is not None:
        return  # restarted after a failure that no restart mends; train() raises it
    torch.set_num_threads(max(1, int(job.workers.cpus_per_worker)))
    if not job.workers.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # About collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    with _errors_left_for_caller(job):
        RayTraining(job, ray.train.torch.get_device(), rank, world_size).run()


def _evaluator(settings: dict[str, Any], device: torch.device) -> Evaluator:
    return build_evaluator(from_dict(TrainingJob, settings, "the training job"), device)


@contextmanager
def _errors_left_for_caller(job: TrainingJob) -> Iterator[None]:
    """Leave a user's error where the caller of ``train`` finds it."""
    try:
        yield
    except TinyFluxError as error:
        job.folder.write(job.error_file, pack_error(error).encode())
        raise
