"""What of a run's data only its workers together know."""

import torch.distributed as dist

from tinyflux.data.growing import GrowingReader
from tinyflux.data.reader import StepReader
from tinyflux.errors import ConfigError
from tinyflux.model.experts import SolUnits
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.distillation import SOL_SAMPLES
from tinyflux.trainer.sharding import rank_and_world


def check_batch_size(config: TrainerConfig, num_workers: int) -> None:
    """Refuse a global batch with too few samples for its parts with a :class:`ConfigError`."""
    parts = num_workers * config.gradient_accumulation
    shuffled = any(target.shuffle for target in config.align)
    if shuffled and config.batch_size < 2 * parts:
        raise ConfigError(
            f"trainer.align shuffles targets among the samples of a micro-batch, and of "
            f"trainer.batch_size = {config.batch_size} over workers.num_workers * "
            f"trainer.gradient_accumulation = {parts} some are of 1 sample: raise it to "
            f"{2 * parts}"
        )
    if config.batch_size < parts:
        raise ConfigError(
            f"trainer.batch_size = {config.batch_size} must be at least workers.num_workers "
            f"* trainer.gradient_accumulation = {num_workers} * {config.gradient_accumulation} "
            f"= {parts}"
        )


def measure_sol(units: SolUnits, reader: StepReader | GrowingReader) -> None:
    """Measure Sol's units on the samples that the run trains on first; called by all workers.

    The first worker reads, and tells the others.
    """
    rank, world_size = rank_and_world()
    if rank == 0 and (examples := reader.sol_examples(SOL_SAMPLES)) is not None:
        stats, spatial = (part.to(units.map_std.device) for part in examples)
        units.measure(stats, spatial, reader.t_buckets)
    if world_size > 1:
        for buffer in units.buffers():
            dist.broadcast(buffer, 0)
