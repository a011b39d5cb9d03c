"""The start of a run: what is refused before anything is begun, and whether there is work left."""

import logging
from collections.abc import Callable

import torch

from tinyflux import run_dir as names
from tinyflux.distributed.data import check_batch_size
from tinyflux.distributed.deepspeed import check_zero
from tinyflux.distributed.first_weights import AnyPlace
from tinyflux.distributed.result import is_finished
from tinyflux.distributed.run_lock import claimed
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import ConfigError, TrainingError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.align_config import check_blocks
from tinyflux.trainer.checkpoint_search import checkpoints_by_step
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.init_from import check_fits, find_weights
from tinyflux.trainer.trackers import check_trackers
from tinyflux.util.urls import join

logger = logging.getLogger(__name__)


def finish(job: TrainingJob, begin: Callable[[], None], work: Callable[[], None]) -> str:
    """Have ``work`` done until the run is finished; not at all if it is.

    Args:
        begin: called once no other training is at work in the run's directory, to write there.

    Returns:
        ``<run_dir>/final``.
    """
    final = join(job.run_dir, names.FINAL)
    if is_finished(job):
        begin()
        logger.info("training is finished: %s", final)
        return final
    check_job(job)
    with claimed(job.run_dir):
        begin()
        work()
    if not is_finished(job):
        raise TrainingError(
            f"the workers ended without finishing the run in {job.run_dir}: see their logs"
        )
    return final


def check_job(job: TrainingJob) -> None:
    """Refuse here what every worker would refuse; TinyFluxError."""
    check_batch_size(job.trainer, job.workers.num_workers)
    if job.workers.engine == "deepspeed":
        check_zero(job.trainer, job.workers.zero_stage, job.workers.offload)
    check_blocks(job.trainer.align, job.model.num_blocks)
    check_trackers(job.trainer.trackers)
    check_places(job.trainer, job.run_dir)
    job.open_data(check_files=True)
    check_first_weights(job)


def check_first_weights(job: TrainingJob) -> None:
    """Refuse first weights that no worker could begin with, before any is started; TinyFluxError.

    A run that goes on reads its checkpoint, and what it began with may be gone; an adapter's
    checkpoint holds no other weights.
    """
    config = job.trainer
    if config.init_from is None:
        return
    if config.adapter is None and checkpoints_by_step(job.checkpoints):
        return
    with torch.device("meta"):
        outline = TinyFluxDeep(job.model)
    places = AnyPlace()
    found = find_weights(config.init_from, config.init_from_ema, places)
    check_fits(found, outline, places, carry=config.adapter is None)


def check_places(config: TrainerConfig, run_dir: str) -> None:
    """Refuse places that a run on Ray does not write to.

    Raises:
        ConfigError: names the setting.
    """
    defaults = TrainerConfig()
    for setting, place in (
        ("checkpoint_dir", names.CHECKPOINTS),
        ("tensorboard_dir", names.TENSORBOARD),
        ("sample_dir", names.SAMPLES),
    ):
        if getattr(config, setting) != getattr(defaults, setting):
            raise ConfigError(
                f"trainer.{setting} is for the library's Trainer: this run writes to "
                f"{join(run_dir, place)}, so set run_dir and leave trainer.{setting} out"
            )
