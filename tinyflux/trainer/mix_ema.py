"""Averages of a length that was not kept, out of a run's checkpoints."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError
from tinyflux.run_dir import length_of_track
from tinyflux.trainer.checkpoint_state import read_state
from tinyflux.trainer.config_checks import LONGEST_EMA
from tinyflux.trainer.power_ema import Mixture, Profile, mixture
from tinyflux.util.files import file_sha256

# Farther from the wanted profile than this it is another average: see docs/training.md.
REACH = 0.1


@dataclass(frozen=True)
class MixedEMA:
    """A power-function average that was mixed after the run.

    Attributes:
        tensors: the model's, on the CPU.
        step: which it reaches up to.
        mixture: of the averages in the checkpoints.
    """

    tensors: dict[str, Tensor]
    step: int
    mixture: Mixture


def mix_ema(checkpoints: Sequence[Path], length: float) -> MixedEMA:
    """The power-function average of ``length`` up to the newest of ``checkpoints``.

    Args:
        checkpoints: directories, each with the averages of ``trainer.ema_lengths``.

    Raises:
        CheckpointError: they keep none, are damaged, or their mixtures do not reach ``length``.
        ConfigError: no average is of that length.
    """
    if not 0 < length < LONGEST_EMA:
        raise ConfigError(
            f"a power-function EMA's length is above 0 and below {LONGEST_EMA:.4f}, which is the "
            f"plain mean's, not {length:g}"
        )
    kept = [pair for directory in checkpoints for pair in _tracks(directory)]
    if not kept:
        raise CheckpointError(
            f"none of the {len(checkpoints)} checkpoints keeps a power-function EMA: a run does so "
            "from its first step with trainer.ema_lengths"
        )
    newest = max(profile.step for _, profile in kept)
    mixed = mixture([profile for _, profile in kept], Profile(length, newest))
    if mixed.error > REACH:
        lengths = sorted({profile.length for _, profile in kept})
        raise CheckpointError(
            f"a length of {length:g} is out of reach: the nearest mixture of lengths "
            f"{', '.join(f'{one:g}' for one in lengths)} in {len(checkpoints)} checkpoints misses "
            f"its profile by {mixed.error:.0%}; choose one nearer to them, or keep more checkpoints"
        )
    return MixedEMA(_add_up([path for path, _ in kept], mixed.weights), int(newest), mixed)


def _tracks(directory: Path) -> list[tuple[Path, Profile]]:
    """The files of averages in a checkpoint, and what each is."""
    state = read_state(directory)
    found: list[tuple[Path, Profile]] = []
    for path in sorted(directory.iterdir()):
        length = length_of_track(path.name)
        if length is None:
            continue
        if state.files.get(path.name) != file_sha256(path):
            raise DamagedCheckpointError(f"{path} is not as it was written: its SHA-256 is another")
        found.append((path, Profile(length, state.step)))
    return found


def _add_up(paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of the files' tensors; one tensor at a time is in memory beside it."""
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            names = files[-1].keys()
            return {name: _sum([file.get_tensor(name) for file in files], weights)
                    for name in names}  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoints' EMAs do not go together: {error}") from error


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Added in double precision: weights may be large and of both signs."""
    last = tensors[-1]
    if not last.is_floating_point():
        return last
    total = torch.zeros(last.shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total.to(last.dtype)
