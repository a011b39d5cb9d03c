"""A whole training in this process, without Ray."""

from collections.abc import Callable
from dataclasses import replace

from tinyflux.distributed.start import finish
from tinyflux.distributed.training import Training
from tinyflux.distributed.training_job import TrainingJob, TrainRun
from tinyflux.util.device import resolve_device


def train_local(run: TrainRun, begin: Callable[[], None] = lambda: None) -> str:
    """Train until ``trainer.total_steps`` with plain torch; at once if that is done.

    It goes on from what :func:`tinyflux.distributed.train.train` left, and the other way about: the
    samples of every position and the run's directory are the same. Of ``workers`` it takes
    ``use_gpu`` alone.

    Args:
        begin: called once no other training is at work in the run's directory, to write there.

    Returns:
        ``<run_dir>/final``: the EMA weights and config, for ``load_model``.

    Raises:
        TinyFluxError: what a user can mend.
    """
    job = TrainingJob.of(run)
    job.workers = replace(
        job.workers, num_workers=1, min_workers=None, engine="torch", offload=False
    )
    device = resolve_device("cuda" if job.workers.use_gpu else "cpu")
    return finish(job, begin, lambda: Training(job, device).run())
