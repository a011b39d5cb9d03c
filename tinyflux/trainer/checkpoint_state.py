"""Where a run stands, as a checkpoint's ``trainer_state.json`` says it and proves it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyflux.data.passes import NO_PASSES, Passes
from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError
from tinyflux.run_dir import CHECKPOINT_STATE
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write

FORMAT_VERSION = 1
STATE_DIGEST = "sha256"  # in the file, of all that it says beside


@dataclass
class TrainerState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        samples_seen: samples trained on, which is the position of the next.
        epoch: passes over the data that are complete.
        epoch_batches: micro-batches done of the pass under way.
        seed: the run's seed.
        trainer: the TrainerConfig as plain data.
        format_version: of this file.
        files: SHA-256 of the checkpoint's other files by name; empty in those that were written
            before it was kept.
        init_from: ``source`` and ``sha256`` of the weights that the run began with; empty if it
            began with random ones.
        passes: which shards the passes read of caches that were being built; empty else.
    """

    step: int = 0
    samples_seen: int = 0
    epoch: int = 0
    epoch_batches: int = 0
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    files: dict[str, str] = field(default_factory=dict)
    init_from: dict[str, str] = field(default_factory=dict)
    passes: Passes = NO_PASSES


def read_state(directory: Path) -> TrainerState:
    """The state of a checkpoint, of which nothing else is read.

    Raises:
        DamagedCheckpointError: it is missing, cut off or altered.
        CheckpointError: it is of a later format.
    """
    path = directory / CHECKPOINT_STATE
    try:
        return parse_state(path.read_bytes(), str(path))
    except OSError as error:
        raise DamagedCheckpointError(
            f"{directory} is not a training checkpoint: cannot read {CHECKPOINT_STATE} ({error})"
        ) from error


def parse_state(text: bytes, where: str) -> TrainerState:
    """A ``trainer_state.json``; ``where`` names it in errors. See :func:`read_state`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{where} is not a training checkpoint's: it is not JSON ({error})"
        ) from error
    if not isinstance(data, dict):
        raise DamagedCheckpointError(
            f"{where} is not a training checkpoint's: it holds no settings"
        )
    written = data.pop(STATE_DIGEST, None)
    if written is not None and written != _digest(data):
        raise DamagedCheckpointError(f"{where} is not as it was written: its SHA-256 is another")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    try:
        return from_dict(TrainerState, data, where)
    except ConfigError as error:
        raise DamagedCheckpointError(str(error)) from error


def write_state(directory: Path, state: TrainerState) -> None:
    """Write the state into a checkpoint whose other files are there."""
    data = to_dict(state)
    text = json.dumps({**data, STATE_DIGEST: _digest(data)}, indent=2)
    atomic_write(directory / CHECKPOINT_STATE, text.encode())


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
