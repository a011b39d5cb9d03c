"""A run's average of another length, as a model of its own."""

import logging
from pathlib import Path

import torch

from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.loader import load_config, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import check_tensors
from tinyflux.run_dir import CHECKPOINTS
from tinyflux.storage.copies import fetch
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.checkpoint_search import checkpoints_by_step
from tinyflux.trainer.mix_ema import mix_ema
from tinyflux.util.urls import join

logger = logging.getLogger(__name__)


def write_mixed_ema(run_dir: str, length: float, output: Path) -> Path:
    """Write a run's power-function average of ``length`` to ``output``, as ``load_model`` opens it.

    Args:
        run_dir: a path or a URL, whose checkpoints keep the averages of ``trainer.ema_lengths``.
        output: a directory that is not there, or empty.

    Raises:
        ConfigError: ``output`` holds something, or there is no average of that length.
        CheckpointError: there are no checkpoints, or they do not reach it.
    """
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"'{output}' is not empty: name a directory that does not exist yet")
    place = join(run_dir, CHECKPOINTS)
    names = checkpoints_by_step(open_folder(place))
    if not names:
        raise CheckpointError(f"there are no checkpoints in '{place}': name a run's directory")
    directories = [Path(fetch(join(place, names[step]))) for step in sorted(names)]
    mixed = mix_ema(directories, length)
    with torch.device("meta"):
        model = TinyFluxDeep(load_config(str(directories[-1])))
    check_tensors(model.state_dict(), mixed.tensors, f"the EMA of '{place}'")
    logger.info(
        "an EMA of length %g up to step %d, of %d: its profile is met to %.2g",
        length, mixed.step, len(mixed.mixture.weights), mixed.mixture.error,
    )  # fmt: skip
    return save_model(model, output, mixed.tensors)
