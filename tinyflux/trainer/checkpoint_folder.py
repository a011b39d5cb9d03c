"""A run's checkpoints side by side: their names, and which of them stay."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from tinyflux.run_dir import CHECKPOINT_STATE


def step_directory(root: str | os.PathLike[str], step: int) -> Path:
    """``<root>/step_00001000``."""
    return Path(root) / f"step_{step:08d}"


def epoch_directory(root: str | os.PathLike[str], epoch: int) -> Path:
    """``<root>/epoch_0003``."""
    return Path(root) / f"epoch_{epoch:04d}"


def prune(newest: Path, keep: int, spared: Collection[str] = ()) -> None:
    """Delete all but ``keep`` checkpoints of one kind, steps or epochs, up to ``newest``.

    Those of the names ``spared`` stay as well.

    Later ones, which a run that continued from an older one has still to reach, do not count:
    they are damaged, and will be replaced.
    """
    kind = newest.name.split("_")[0]
    paths = sorted(newest.parent.glob(f"{kind}_*/{CHECKPOINT_STATE}"))
    paths = [path for path in paths if path.parent.name <= newest.name]
    old = paths[: max(0, len(paths) - keep)]
    for state in (path for path in old if path.parent.name not in spared):
        # First the file that makes it a checkpoint, so that a half-deleted one is never read.
        state.unlink()
        shutil.rmtree(state.parent, ignore_errors=True)


def remove_partial(root: str | os.PathLike[str]) -> None:
    """Delete what killed writers left under ``root``."""
    for path in Path(root).glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*Path(root).glob("step_*"), *Path(root).glob("epoch_*")):
        if path.is_dir() and not (path / CHECKPOINT_STATE).exists():
            shutil.rmtree(path, ignore_errors=True)
