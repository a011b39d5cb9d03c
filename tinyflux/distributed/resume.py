"""How a run begins, and how it goes on from what it has recorded."""

import logging
from dataclasses import asdict

import torch
from torch import nn

from tinyflux.data.growing import GrowingReader
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader
from tinyflux.distributed.data import measure_sol
from tinyflux.distributed.first_weights import AnyPlace
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.errors import ConfigError
from tinyflux.model.initialization import draw_by_name
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.adapter import begin_adapter, check_same_adapter, check_same_base
from tinyflux.trainer.checkpoint import Checkpoint
from tinyflux.trainer.checkpoint_search import FoundCheckpoint, load_newest
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine
from tinyflux.trainer.init_from import WeightsFile, begin_from
from tinyflux.trainer.power_ema import PowerEMA
from tinyflux.trainer.projectors import check_same_targets, load_projectors, with_projectors

logger = logging.getLogger(__name__)


def find_checkpoint(job: TrainingJob) -> FoundCheckpoint | None:
    """What the run goes on from, None before its first checkpoint; CheckpointError."""
    return load_newest(job.checkpoints, job.checkpoint_directory, job.trainer.verify_checkpoints)


def first_weights(job: TrainingJob, device: torch.device) -> TinyFluxDeep:
    """A student as every run of this seed begins with it, the same in every process."""
    torch.manual_seed(job.trainer.seed)
    model = TinyFluxDeep(job.model)
    if job.trainer.init_by_name:
        draw_by_name(model, job.trainer.seed)
    return model.to(device)


def prepare_student(
    model: TinyFluxDeep,
    checkpoint: Checkpoint | None,
    init_from: WeightsFile | None,
    job: TrainingJob,
    data: CacheMixture,
    reader: StepReader | GrowingReader,
) -> TrainerState:
    """Give ``model`` a checkpoint's weights, or what a new run needs; where the run stands.

    All workers take part.

    Args:
        init_from: what a new run begins with; and what an adapter is on, whenever it is trained.

    Raises:
        CheckpointError: weights that were made for another model, or are damaged.
        ConfigError: see :func:`check_same_stream`.
    """
    config = job.trainer
    if checkpoint is not None:
        check_same_adapter(checkpoint.state, config, f"the run in {job.run_dir}")
        check_same_targets(checkpoint.state, config, f"the run in {job.run_dir}")
    if config.adapter is not None:
        assert init_from is not None  # TrainerConfig sees to it
        begun = begin_adapter(init_from, model, config, AnyPlace())
        logger.info("an adapter is trained on the weights of %s", init_from)
        if checkpoint is None:
            return TrainerState(seed=config.seed, init_from=asdict(begun))
        check_same_base(checkpoint.state, begun, f"the run in {job.run_dir}")
    if checkpoint is not None:
        checkpoint.check(model)
        checkpoint.load_model(model)
        check_same_stream(checkpoint.state, config, data, job.run_dir)
        return checkpoint.state
    state = TrainerState(seed=config.seed)
    if init_from is not None:
        begun = begin_from(init_from, model, config.init_from or str(init_from), AnyPlace())
        state.init_from = asdict(begun)
        logger.info("beginning with the weights of %s", init_from)
    if config.enable_sol and model.sol_units is not None and not model.sol_units.measured:
        measure_sol(model.sol_units, reader)
    return state


def prepare_module(
    model: TinyFluxDeep, checkpoint: Checkpoint | None, config: TrainerConfig
) -> nn.Module:
    """What the engine trains: ``model`` and its projectors, a checkpoint's where it goes on.

    Raises:
        CheckpointError: the checkpoint's do not fit.
    """
    module = with_projectors(model, config)
    if checkpoint is not None:
        load_projectors(module, checkpoint.projectors, f"checkpoint {checkpoint.path}")
    return module


def prepare_ema(engine: Engine, decay: float, checkpoint: Checkpoint | None) -> EMA:
    """This worker's part of the EMA; the engine takes over a checkpoint's optimizer state, too."""
    ema = EMA(engine.shard(), decay)
    if checkpoint is not None:
        # Of a run with an adapter the checkpoint holds no weights that stay as they are.
        shadow = {**ema.shadow, **engine.split(checkpoint.shadow)}
        ema.load_state_dict({"decay": decay, "shadow": shadow})
        engine.load_optimizer_state(checkpoint.optimizer)
    return ema


def prepare_power_ema(
    engine: Engine, config: TrainerConfig, checkpoint: Checkpoint | None
) -> PowerEMA:
    """This worker's part of the power-function EMAs, of which there may be none.

    Raises:
        CheckpointError: the checkpoint keeps none of a length that is set.
    """
    power_ema = PowerEMA(engine.shard(), config.ema_lengths)
    if checkpoint is not None:
        parts = {length: dict(engine.split(track)) for length, track in checkpoint.tracks.items()}
        power_ema.load(parts, f"checkpoint {checkpoint.path}")
    return power_ema


def check_same_stream(
    state: TrainerState, config: TrainerConfig, data: CacheMixture, run_dir: str
) -> None:
    """Refuse settings under which a run that goes on would see samples twice, or never.

    Raises:
        ConfigError: another seed, another start, or another batch size where batches are dealt to
            sizes.
    """
    if state.seed != config.seed:
        raise ConfigError(
            f"the run in {run_dir} began with trainer.seed = {state.seed}, not "
            f"{config.seed}: keep it, or use a new run_dir"
        )
    _check_same_start(state, config, run_dir)
    before = state.trainer.get("batch_size", config.batch_size)
    if before != config.batch_size and data.sizes() > 1:
        raise ConfigError(
            f"the run in {run_dir} began with trainer.batch_size = {before}, not "
            f"{config.batch_size}, and its pictures are of {data.sizes()} sizes, whose order "
            "follows the batch size: keep it, or use a new run_dir"
        )


def check_same_growth(state: TrainerState, config: TrainerConfig, run_dir: str) -> None:
    """Refuse settings under which passes over caches that grow would be others than they were.

    Raises:
        ConfigError: the run began on finished caches and is to go on on growing ones, or the other
            way; or another batch size.
    """
    began, asked = bool(state.passes.spans), config.start_at_rows is not None
    if began != asked:
        raise ConfigError(
            f"the run in {run_dir} began {'with' if began else 'without'} trainer.start_at_rows, "
            "and the order of its samples follows from that: keep it so, or use a new run_dir"
        )
    before = state.trainer.get("batch_size", config.batch_size)
    if began and before != config.batch_size:
        raise ConfigError(
            f"the run in {run_dir} began with trainer.batch_size = {before}, not "
            f"{config.batch_size}, and its passes over growing caches end with whole batches: keep "
            "it, or use a new run_dir"
        )


def _check_same_start(state: TrainerState, config: TrainerConfig, run_dir: str) -> None:
    """Refuse a run that goes on if it began otherwise; where the weights lie now does not matter.

    Raises:
        ConfigError: it began with random weights and is to begin with others, or the other way.
    """
    began, asked = state.init_from.get("source"), config.init_from
    if bool(began) != bool(asked):
        raise ConfigError(
            f"the run in {run_dir} began with {f'the weights of {began}' if began else 'random'}"
            f"{'' if began else ' weights'}, and trainer.init_from is {asked or 'null'}: keep it "
            "as it was, or use a new run_dir"
        )
    if began != asked:
        logger.warning(
            "the run in %s began with the weights of %s: trainer.init_from '%s' is not read",
            run_dir, began, asked,
        )  # fmt: skip
