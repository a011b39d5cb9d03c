"""Training on Ray: workers around the library's training loop.

Everything a run knows is in its directory::

    checkpoints/   samples/   tb/   metrics.jsonl   final/   ray/

``train`` continues from the latest complete checkpoint there, whether the run was stopped, a worker
died or the number of workers was changed. A run at a URL is written on the main worker's disk and
uploaded with each checkpoint.
"""

import hashlib
import json
import logging
import os
import posixpath
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from tinyflux import errors
from tinyflux.cache.config import MixSource
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.data import check_batch_size, measure_sol
from tinyflux.distributed.deepspeed import DeepSpeedEngine, check_zero
from tinyflux.distributed.evaluator import ActorEvaluator
from tinyflux.distributed.metrics import RayMetrics
from tinyflux.distributed.mirror import Mirror
from tinyflux.distributed.ray_session import ensure_ray, train_knows_its_ray
from tinyflux.errors import CheckpointError, ConfigError, TinyFluxError, TrainingError
from tinyflux.inference.sampler import Sampler
from tinyflux.model.config import ZooConfig
from tinyflux.model.loader import CONFIG_NAME, WEIGHTS_NAME, save_model
from tinyflux.model.model import TinyFluxConfig, TinyFluxDeep
from tinyflux.run_dir import CHECKPOINTS
from tinyflux.storage.copies import fetch, local_directory
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import RemoteFolder, open_folder
from tinyflux.trainer.card import model_card
from tinyflux.trainer.checkpoint import (
    STATE_FILE,
    TrainerState,
    latest_checkpoint,
    left_out_if_damaged,
    load_checkpoint,
    parse_state,
    remove_partial,
)
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine, TorchEngine
from tinyflux.trainer.evaluation import Evaluator
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.prefetch import prefetch
from tinyflux.trainer.recorder import Recorder, RunPaths
from tinyflux.trainer.trackers import check_trackers
from tinyflux.trainer.upload import Uploader
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write, full_disk_ends_run
from tinyflux.util.logging import log_to_console
from tinyflux.util.text import first_line, last_line
from tinyflux.util.urls import is_url, join

FINISHED = "training.json"  # in final/, written last
CARD, GRID = "README.md", "samples.png"
LOCK = ".training.lock"

logger = logging.getLogger(__name__)


class TrainRun(Protocol):
    """What :func:`train` reads of a RunConfig."""

    run_dir: str
    cache: Any
    mix: list[MixSource]
    model: TinyFluxConfig
    trainer: TrainerConfig
    workers: WorkersConfig
    zoo: ZooConfig


@dataclass
class _Job:
    """What a worker is told, as plain data between processes.

    Attributes:
        attempt: names this call of :func:`train`, for its error file.
    """

    run_dir: str
    data: list[MixSource]
    model: TinyFluxConfig
    trainer: TrainerConfig
    workers: WorkersConfig
    zoo: ZooConfig
    attempt: str

    @cached_property
    def folder(self) -> Folder:
        """The run's, at its path or URL."""
        return open_folder(self.run_dir)

    @property
    def root(self) -> Path:
        """Where the main worker writes: the run's directory, or for a URL one of this machine."""
        if not is_url(self.run_dir):
            return Path(self.run_dir)
        own = hashlib.sha256(self.run_dir.encode()).hexdigest()[:16]
        return local_directory() / "runs" / own / self.folder.name

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def error_file(self) -> str:
        """In ``folder``."""
        return f"ray/{self.attempt}.error.json"

    def paths(self) -> RunPaths:
        """The run directory's layout; it stands in for the trainer's own paths."""
        return RunPaths(
            checkpoints=self.root / "checkpoints",
            samples=self.root / "samples",
            tensorboard=self.root / "tb",
            metrics=self.root / "metrics.jsonl",
        )

    def open_data(self, check_files: bool) -> CacheMixture:
        """The caches, checked against the model."""
        data = CacheMixture(self.data, check_files)
        data.check(
            self.model,
            self.trainer.enable_lune and self.model.use_lune_expert,
            self.trainer.enable_sol and self.model.use_sol_prior,
        )
        return data


def train(run: TrainRun, begin: Callable[[], None] = lambda: None) -> str:
    """Train until ``trainer.total_steps``; at once if that is done.

    Args:
        begin: called once no other training is at work in the run's directory, to write there.

    Returns:
        ``<run_dir>/final``: the EMA weights and config, for ``load_model``.

    Raises:
        TinyFluxError: what a user can mend; raised here whichever process found it.
    """
    job = _Job(
        run_dir=run.run_dir if is_url(run.run_dir) else os.path.abspath(run.run_dir),
        data=list(run.mix) or [MixSource(run.cache.path)],
        model=run.model,
        trainer=run.trainer,
        workers=run.workers,
        zoo=run.zoo,
        attempt=f"train-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
    )
    final = join(job.run_dir, "final")
    if _finished(job):
        begin()
        logger.info("training is finished: %s", final)
        return final
    check_batch_size(job.trainer, job.workers.num_workers)
    if job.workers.engine == "deepspeed":
        check_zero(job.trainer, job.workers.zero_stage, job.workers.offload)
    check_trackers(job.trainer.trackers)
    check_places(job.trainer, job.run_dir)
    job.open_data(check_files=True)

    try:
        with claimed(job):
            begin()
            _fit(job)
    except TrainingError as error:
        raise (_take_error(job) or error) from error
    if (left := _take_error(job)) is not None:
        raise left
    if not _finished(job):
        raise TrainingError(
            f"the workers ended without finishing the run in {job.run_dir}: see their logs"
        )
    return final


def check_places(config: TrainerConfig, run_dir: str) -> None:
    """Refuse places that a run on Ray does not write to.

    Raises:
        ConfigError: names the setting.
    """
    defaults = TrainerConfig()
    for name, place in (
        ("checkpoint_dir", "checkpoints"),
        ("tensorboard_dir", "tb"),
        ("sample_dir", "samples"),
    ):
        if getattr(config, name) != getattr(defaults, name):
            raise ConfigError(
                f"trainer.{name} is for the library's Trainer: this run writes to "
                f"{join(run_dir, place)}, so set run_dir and leave trainer.{name} out"
            )


@contextmanager
def claimed(job: _Job) -> Iterator[None]:
    """Make the run's directory this process's while it trains.

    A run at a URL has no lock: object stores know none.

    Raises:
        TrainingError: another training is at work there, or the directory cannot be written.
    """
    if is_url(job.run_dir):
        yield
        return
    path = job.root / LOCK
    holder = path.with_suffix(".holder")
    lock = FileLock(path)
    try:
        job.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        name = holder.read_text() if holder.exists() else "another process"
        raise TrainingError(
            f"{job.run_dir} is being trained by {name}: wait for it, end it, or use another run_dir"
        ) from None
    except OSError as error:
        raise TrainingError(f"{job.run_dir} cannot be written: {first_line(error)}") from error
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _fit(job: _Job) -> None:
    """Run the workers."""
    ensure_ray()
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, folder = job.workers, job.folder
    if isinstance(folder, RemoteFolder):
        storage, filesystem = f"{folder.root}/ray", folder.filesystem
    else:
        storage, filesystem = str(job.root / "ray"), None
    size: dict[str, Any] = {"num_workers": workers.num_workers}
    if workers.min_workers is not None:
        size = {
            "num_workers": (workers.min_workers, workers.num_workers),
            "elastic_resize_monitor_interval_s": workers.resize_seconds,
        }
    trainer = TorchTrainer(
        _worker,
        train_loop_config=to_dict(job),
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            **size,
            use_gpu=workers.use_gpu,
            resources_per_worker={
                "CPU": workers.cpus_per_worker,
                **({"GPU": workers.gpus_per_worker} if workers.use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=job.attempt,
            storage_path=storage,
            storage_filesystem=filesystem,
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


def _worker(settings: dict[str, Any]) -> None:
    """One worker's whole life."""
    import ray.train
    import ray.train.torch

    log_to_console()
    job = from_dict(_Job, settings, "the training job")
    if job.folder.size(job.error_file) is not None:
        return  # restarted after a failure that no restart mends; train() raises it
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(job.workers.cpus_per_worker)))
    if not job.workers.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # About collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    with _reported(job):
        _train_on(job, ray.train.torch.get_device(), rank, world_size)


def _train_on(job: _Job, device: torch.device, rank: int, world_size: int) -> None:
    """Continue the run on this worker until it is done."""
    from ray.train.collective import broadcast_from_rank_zero

    config, paths, main = job.trainer, job.paths(), rank == 0
    data = job.open_data(check_files=main)  # a thousand workers would ask about millions of files
    reader = StepReader(
        data,
        data.held_out(config.val_fraction),
        config.batch_size,
        config.gradient_accumulation,
        config.seed,
    )

    torch.manual_seed(config.seed)  # the same first weights on every worker
    model = TinyFluxDeep(job.model).to(device)
    mirror = None
    if main and isinstance(folder := job.folder, RemoteFolder):
        keep = {"step": config.keep_last_n_steps, "epoch": config.keep_last_n_epochs}
        mirror = Mirror(folder, job.root, keep)
        mirror.pull()
    name = broadcast_from_rank_zero(_latest(job) if main else None)
    path = None if name is None else _local_checkpoint(job, name)
    # The first worker has compared it already, to choose it.
    verify = config.verify_checkpoints and not main
    checkpoint = None if path is None else load_checkpoint(path, verify)
    state = TrainerState(seed=config.seed) if checkpoint is None else checkpoint.state
    if checkpoint is not None:
        checkpoint.check(model)
        checkpoint.load_model(model)
        check_same_stream(state, config, data, job.run_dir)
    elif config.enable_sol and model.sol_units is not None:
        measure_sol(model.sol_units, reader)
    engine = _engine(job, model)
    ema = EMA(engine.shard(), config.ema_decay)
    if main:
        remove_partial(paths.checkpoints)
    if checkpoint is not None:
        shadow = dict(engine.split(checkpoint.shadow))
        ema.load_state_dict({"decay": config.ema_decay, "shadow": shadow})
        engine.load_optimizer_state(checkpoint.optimizer)
        if main:
            logger.info("continuing from %s", path)
    del checkpoint

    wanted = config.validate_every or (config.sample_every and config.sample_prompts)
    recorder = None
    if main:
        recorder = Recorder(
            config,
            paths,
            _beside(job) if wanted else None,
            [RayMetrics(job.root)],
            mirror.push_if_reached if mirror is not None else lambda: None,
        )
    null_text = data.null_text if config.text_dropout > 0 else None
    loop = TrainLoop(engine, config, state, ema, null_text, data.t_buckets, recorder)
    steps = prefetch(reader.steps(state.samples_seen, rank, world_size))
    try:
        loop.run(steps)
    finally:
        steps.close()  # type: ignore[attr-defined]
    _, averaged = loop.whole_weights()
    if averaged is not None:
        with full_disk_ends_run(job.run_dir):
            save_model(model, job.final, averaged)
            given = _describe(job, data, sum(part.numel() for part in averaged.values()))
            record = {"step": state.step, "samples_seen": state.samples_seen, "seed": config.seed}
            atomic_write(job.final / FINISHED, json.dumps(record, indent=2).encode())
        if config.hf_repo_id is not None:
            uploader = Uploader(config.hf_repo_id, job.root / ".uploads")
            uploader.submit(job.final, "", (WEIGHTS_NAME, CONFIG_NAME, *given))
            uploader.close()
    if recorder is not None:
        recorder.mark_best(state.step)
    if mirror is not None:
        mirror.push()
        shutil.rmtree(job.root, ignore_errors=True)


def check_same_stream(
    state: TrainerState, config: TrainerConfig, data: CacheMixture, run_dir: str
) -> None:
    """Refuse settings under which a run that goes on would see samples twice, or never.

    Raises:
        ConfigError: another seed, or another batch size where batches are dealt to sizes.
    """
    if state.seed != config.seed:
        raise ConfigError(
            f"the run in {run_dir} began with trainer.seed = {state.seed}, not "
            f"{config.seed}: keep it, or use a new run_dir"
        )
    before = state.trainer.get("batch_size", config.batch_size)
    if before != config.batch_size and data.sizes() > 1:
        raise ConfigError(
            f"the run in {run_dir} began with trainer.batch_size = {before}, not "
            f"{config.batch_size}, and its pictures are of {data.sizes()} sizes, whose order "
            "follows the batch size: keep it, or use a new run_dir"
        )


def _latest(job: _Job) -> str | None:
    """The name of the newest whole checkpoint, such as ``step_00001000``; None before the first.

    Raises:
        CheckpointError: there are some, all of them damaged: to begin again would overwrite what
            the run recorded.
    """
    folder, verify = job.folder, job.trainer.verify_checkpoints
    if isinstance(folder, RemoteFolder):
        marks = [
            path for path in folder.list(CHECKPOINTS) if posixpath.basename(path) == STATE_FILE
        ]
        newest = _newest_whole(job, folder, marks, verify)
    else:
        root = job.paths().checkpoints
        marks = [str(path) for path in root.glob(f"[!.]*/{STATE_FILE}")]
        whole = latest_checkpoint(root, verify)
        newest = None if whole is None else whole.name
    if newest is None and marks:
        raise CheckpointError(
            f"none of the {len(marks)} checkpoints in {join(job.run_dir, CHECKPOINTS)} is whole: "
            "bring one back, or delete them to begin again"
        )
    return newest


def _newest_whole(job: _Job, folder: RemoteFolder, marks: list[str], verify: bool) -> str | None:
    """As :func:`tinyflux.trainer.checkpoint.latest_checkpoint`, of state files at a URL."""
    found: list[tuple[int, str]] = []
    for path in sorted(marks):
        with left_out_if_damaged():
            state = parse_state(folder.read(path), join(job.run_dir, path))
            found.append((state.step, posixpath.basename(posixpath.dirname(path))))
    for _, name in sorted(found, reverse=True):
        with left_out_if_damaged():
            load_checkpoint(_local_checkpoint(job, name), verify)
            return name
    return None


def _local_checkpoint(job: _Job, name: str) -> Path:
    """The checkpoint ``name`` on this machine's disk."""
    if is_url(job.run_dir):
        return Path(fetch(join(job.run_dir, f"{CHECKPOINTS}/{name}")))
    return job.paths().checkpoints / name


def _describe(job: _Job, data: CacheMixture, parameters: int) -> tuple[str, ...]:
    """Write the model card and its pictures into ``final``; the files' names."""
    names = [CARD]
    drawn = sorted(job.paths().samples.glob("step_*.png"))
    if drawn:
        names.append(GRID)
        atomic_write(job.final / GRID, drawn[-1].read_bytes())
    learned = {"Lune": job.trainer.enable_lune and job.model.use_lune_expert,
               "Sol": job.trainer.enable_sol and job.model.use_sol_prior}  # fmt: skip
    card = model_card(
        title=job.trainer.hf_repo_id or job.root.name,
        source=job.trainer.hf_repo_id or "final",
        parameters=parameters,
        model=job.model,
        trainer=to_dict(job.trainer),
        records=read_metrics(job.paths().metrics),
        data=[
            f"`{Path(source.path).name}` (weight {source.weight:g}): {len(cache)} rows, manifest "
            f"SHA-256 `{cache.digest}`"
            for source, cache in zip(data.sources, data.caches, strict=True)
        ],
        teachers=[name for name, used in learned.items() if used],
        grid=GRID if drawn else None,
    )
    atomic_write(job.final / CARD, card.encode())
    return tuple(names)


def _engine(job: _Job, model: TinyFluxDeep) -> Engine:
    if job.workers.engine == "torch":
        return TorchEngine(model, job.trainer)
    return DeepSpeedEngine(model, job.trainer, job.workers.zero_stage, job.workers.offload)


def _beside(job: _Job) -> ActorEvaluator:
    workers = job.workers
    return ActorEvaluator(
        partial(_evaluator, to_dict(job)),
        workers.evaluator_gpus if workers.use_gpu else 0.0,
        max(1, int(workers.cpus_per_worker)),
        workers.evaluator_seconds,
    )


def _evaluator(settings: dict[str, Any], device: torch.device) -> Evaluator:
    """What looks at the run's weights, in its own process."""
    job = from_dict(_Job, settings, "the training job")
    config = job.trainer
    data = job.open_data(check_files=False)
    held_out = None
    if config.validate_every is not None:
        held_out = read_held_out(data, data.held_out(config.val_fraction))
    model = TinyFluxDeep(job.model).to(device)
    ema = EMA(model, config.ema_decay)
    sampler = None
    if config.sample_every is not None and config.sample_prompts:
        zoo = replace(job.zoo, device=str(device)).build(job.model)
        zoo.load_vae()
        zoo.load_t5()
        zoo.load_clip()
        sampler = Sampler(zoo, model, ema, device, config.dtype)
    return Evaluator(model, ema, config, data.t_buckets, held_out, sampler)


def _finished(job: _Job) -> bool:
    """Whether ``final/`` holds the result of all of the run's steps."""
    try:
        done = json.loads(job.folder.read(f"final/{FINISHED}"))
        return done["step"] >= job.trainer.total_steps
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _reported(job: _Job) -> Iterator[None]:
    """Leave a user's error where the caller of :func:`train` finds it."""
    try:
        yield
    except TinyFluxError as error:
        record = {"type": type(error).__name__, "message": str(error)}
        job.folder.write(job.error_file, json.dumps(record).encode())
        raise


def _take_error(job: _Job) -> TinyFluxError | None:
    """The error that a worker left, as it was raised there; its file goes."""
    try:
        record = json.loads(job.folder.read(job.error_file))
    except FileNotFoundError:
        return None
    job.folder.delete(job.error_file)
    kind = getattr(errors, record["type"], TinyFluxError)
    return kind(record["message"])
