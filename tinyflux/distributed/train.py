"""Training on Ray.

Everything a run knows is in its directory (:mod:`tinyflux.run_dir`). ``train`` continues from the
newest whole checkpoint there, whether the run was stopped, a worker died or the number of workers
was changed. A run at a URL is written on the main worker's disk and uploaded with each checkpoint.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tinyflux import run_dir as names
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.ray_session import ensure_ray, train_knows_its_ray
from tinyflux.distributed.relay import unpack_error
from tinyflux.distributed.start import finish
from tinyflux.distributed.training_job import TrainingJob, TrainRun
from tinyflux.errors import TinyFluxError, TrainingError
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.config import to_dict
from tinyflux.util.text import last_line


def train(run: TrainRun, begin: Callable[[], None] = lambda: None) -> str:
    """Train until ``trainer.total_steps``; at once if that is done.

    Args:
        begin: called once no other training is at work in the run's directory, to write there.

    Returns:
        ``<run_dir>/final``: the EMA weights and config, for ``load_model``.

    Raises:
        TinyFluxError: what a user can mend; raised here whichever process found it.
    """
    job = TrainingJob.of(run)
    return finish(job, begin, partial(_work, job))


def _work(job: TrainingJob) -> None:
    """Run the workers, and raise what ended one of them as it was raised there."""
    try:
        _fit(job)
    except TrainingError as error:
        raise (_take_error(job) or error) from error
    if (left := _take_error(job)) is not None:
        raise left


def _fit(job: TrainingJob) -> None:
    """Run the workers."""
    ensure_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from tinyflux.distributed.train_worker import train_worker

    workers = job.workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=to_dict(job),
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(**_scaling(workers)),
        run_config=ray.train.RunConfig(
            name=job.attempt,
            **ray_storage(job.folder),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        with train_knows_its_ray():
            trainer.fit()
    except Exception as error:
        raise TrainingError(
            f"training in {job.run_dir} stopped after {workers.max_failures} restarts: "
            f"{type(error).__name__}: {last_line(error)}"
        ) from error


def _scaling(workers: WorkersConfig) -> dict[str, Any]:
    """How many workers, and what each takes of the cluster, as Ray's ScalingConfig has it."""
    size: dict[str, Any] = {"num_workers": workers.num_workers}
    if workers.min_workers is not None:
        size = {
            "num_workers": (workers.min_workers, workers.num_workers),
            "elastic_resize_monitor_interval_s": workers.resize_seconds,
        }
    resources = {"CPU": workers.cpus_per_worker}
    if workers.use_gpu:
        resources["GPU"] = workers.gpus_per_worker
    return {**size, "use_gpu": workers.use_gpu, "resources_per_worker": resources}


def ray_storage(folder: Folder) -> dict[str, Any]:
    """Where Ray Train and Tune keep their own, in ``folder``, as their ``RunConfig`` has it."""
    if isinstance(folder, RemoteFolder):
        place, system = f"{folder.root}/{names.RAY}", folder.filesystem
        return {"storage_path": place, "storage_filesystem": system}
    return {"storage_path": str(Path(folder.location).absolute() / names.RAY)}


def _take_error(job: TrainingJob) -> TinyFluxError | None:
    """The error that a worker left, as it was raised there; its file goes."""
    try:
        packed = job.folder.read(job.error_file)
    except FileNotFoundError:
        return None
    job.folder.delete(job.error_file)
    return unpack_error(packed)
