"""Which of a run's checkpoints it goes on from."""

import logging
import posixpath
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinyflux.errors import CheckpointError, DamagedCheckpointError
from tinyflux.run_dir import CHECKPOINT_STATE
from tinyflux.storage.folder import Folder, LocalFolder
from tinyflux.trainer.checkpoint import Checkpoint, load_checkpoint
from tinyflux.trainer.checkpoint_state import parse_state
from tinyflux.util.urls import join

logger = logging.getLogger(__name__)


@dataclass
class FoundCheckpoint:
    """A checkpoint that a run goes on from.

    Attributes:
        name: that of its directory, such as ``step_00001000``.
    """

    name: str
    checkpoint: Checkpoint


def load_newest(
    folder: Folder, directory_of: Callable[[str], Path], verify: bool
) -> FoundCheckpoint | None:
    """The whole checkpoint with the most steps in a run's ``folder`` of checkpoints.

    A damaged one is passed over, and a line of the log says so.

    Args:
        directory_of: where the checkpoint of a name is on this machine; fetched if need be.
        verify: read every byte once more, to compare it with what was written.

    Returns:
        None where there is none yet.

    Raises:
        CheckpointError: there are some, all of them damaged: to begin again would overwrite what
            the run recorded.
    """
    names = _names(folder)
    for name in _by_steps(folder, names):
        try:
            return FoundCheckpoint(name, load_checkpoint(directory_of(name), verify))
        except DamagedCheckpointError as error:
            _pass_over(folder, name, error)
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints in {folder.location} is whole: bring one back, "
            "or delete them to begin again"
        )
    return None


def latest_checkpoint(root: str | Path) -> Path | None:
    """The directory of the checkpoint with the most steps under ``root``, by its state; or None."""
    folder = LocalFolder(root)
    name = next(_by_steps(folder, _names(folder)), None)
    return None if name is None else Path(root) / name


def checkpoints_by_step(folder: Folder) -> dict[int, str]:
    """Names of the checkpoints in ``folder`` whose state can be read, by their steps."""
    found: dict[int, str] = {}
    for name in _names(folder):
        with suppress(DamagedCheckpointError):
            found[_read_step(folder, name)] = name
    return found


def _names(folder: Folder) -> list[str]:
    """Names of the checkpoints that were written whole."""
    parts = (posixpath.split(path) for path in folder.list())
    return sorted(
        name
        for name, file in parts
        if file == CHECKPOINT_STATE and name and not name.startswith(".")
    )


def _by_steps(folder: Folder, names: list[str]) -> Iterator[str]:
    """Those whose state can be read, from the most steps to the fewest."""
    steps: list[tuple[int, str]] = []
    for name in names:
        try:
            steps.append((_read_step(folder, name), name))
        except DamagedCheckpointError as error:
            _pass_over(folder, name, error)
    yield from (name for _, name in sorted(steps, reverse=True))


def _read_step(folder: Folder, name: str) -> int:
    path = f"{name}/{CHECKPOINT_STATE}"
    where = join(folder.location, path)
    try:
        return parse_state(folder.read(path), where).step
    except OSError as error:
        raise DamagedCheckpointError(f"{where} cannot be read: {error}") from error


def _pass_over(folder: Folder, name: str, error: DamagedCheckpointError) -> None:
    """Log in one line that a checkpoint is damaged, unless it was pruned meanwhile."""
    if folder.size(f"{name}/{CHECKPOINT_STATE}") is not None:
        logger.warning("%s; an older checkpoint is looked for", error)
