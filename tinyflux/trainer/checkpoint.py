"""Checkpoints: one format for every engine and any number of workers.

A checkpoint is a directory::

    model.safetensors, config.json   the weights in fp32; load_model opens it
    ema.safetensors                  the EMA in fp32
    optimizer.safetensors            <parameter>/<key>, whole tensors
    trainer_state.json               step, place in the data, seed, the run's settings

It is written under another name and renamed when it is whole: one that can be seen is complete.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyflux.errors import CheckpointError
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.ema import check_tensors, read_shadow, save_shadow
from tinyflux.util.config import from_dict, to_dict

FORMAT_VERSION = 1
STATE_FILE = "trainer_state.json"


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
    """

    step: int = 0
    samples_seen: int = 0
    epoch: int = 0
    epoch_batches: int = 0
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass
class Checkpoint:
    """A checkpoint in memory; tensors are whole and on the CPU."""

    path: Path
    model: dict[str, Tensor]
    shadow: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState

    def check(self, model: TinyFluxDeep) -> None:
        """Refuse a whole ``model`` that the weights or the EMA do not fit; CheckpointError."""
        for name, tensors in (("model", self.model), ("ema", self.shadow)):
            where = f"checkpoint {self.path / f'{name}.safetensors'}"
            check_tensors(model.state_dict(), tensors, where)

    def load_model(self, model: TinyFluxDeep) -> None:
        """Put the weights into ``model``, which fits."""
        model.load_state_dict(self.model)


@dataclass
class Contents:
    """What a checkpoint is written from.

    Attributes:
        model: whose config is written.
        weights: the model's whole tensors; ``shadow``: the EMA's.
        optimizer: as of :meth:`tinyflux.trainer.engine.Engine.optimizer_state`.
    """

    model: TinyFluxDeep
    weights: Mapping[str, Tensor]
    shadow: Mapping[str, Tensor]
    ema_decay: float
    optimizer: Mapping[str, Tensor]
    state: TrainerState

    def snapshot(self) -> "Contents":
        """Copies on the CPU, which stay as they are while the run goes on."""
        return replace(
            self,
            weights=cpu_copies(self.weights),
            shadow=cpu_copies(self.shadow),
            optimizer=cpu_copies(self.optimizer),
            state=copy.deepcopy(self.state),
        )


def save_checkpoint(directory: str | os.PathLike[str], contents: Contents) -> None:
    """Write a whole checkpoint or, on an error, nothing.

    Raises:
        CheckpointError: it cannot be written, such as on a full disk.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_model(contents.model, partial, contents.weights)
        save_shadow(partial / "ema.safetensors", contents.shadow, contents.ema_decay, torch.float32)
        save_file(_whole(contents.optimizer), partial / "optimizer.safetensors")
        (partial / STATE_FILE).write_text(json.dumps(to_dict(contents.state), indent=2))
        _flush(partial)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {directory}: {error}; earlier checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged or of a later format.
    """
    directory = Path(directory)
    try:
        state = read_state(directory)
        return Checkpoint(
            path=directory,
            model=load_file(directory / "model.safetensors"),
            shadow=read_shadow(directory / "ema.safetensors")[0],
            optimizer=load_file(directory / "optimizer.safetensors"),
            state=state,
        )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {directory}: {error}") from error


def read_state(directory: Path) -> TrainerState:
    """Only the checkpoint's ``trainer_state.json``."""
    path = directory / STATE_FILE
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} is not a training checkpoint: cannot read {STATE_FILE} ({error})"
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    return from_dict(TrainerState, data, str(path))


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint under ``root`` with the most steps, or None."""
    found = [path.parent for path in Path(root).glob(f"[!.]*/{STATE_FILE}")]
    return max(found, key=lambda path: (read_state(path).step, path.name), default=None)


def step_directory(root: str | os.PathLike[str], step: int) -> Path:
    """``<root>/step_00001000``."""
    return Path(root) / f"step_{step:08d}"


def epoch_directory(root: str | os.PathLike[str], epoch: int) -> Path:
    """``<root>/epoch_0003``."""
    return Path(root) / f"epoch_{epoch:04d}"


def prune(root: str | os.PathLike[str], kind: str, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of ``kind`` (``"step"`` or ``"epoch"``)."""
    paths = sorted(Path(root).glob(f"{kind}_*/{STATE_FILE}"))
    for state in paths[: max(0, len(paths) - keep)]:
        # First the file that makes it a checkpoint, so that a half-deleted one is never read.
        state.unlink()
        shutil.rmtree(state.parent, ignore_errors=True)


def remove_partial(root: str | os.PathLike[str]) -> None:
    """Delete what killed writers left under ``root``."""
    for path in Path(root).glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*Path(root).glob("step_*"), *Path(root).glob("epoch_*")):
        if path.is_dir() and not (path / STATE_FILE).exists():
            shutil.rmtree(path, ignore_errors=True)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them.

    Those of a snapshot are it already: a second copy of them would be the largest of all.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # bitsandbytes gives every parameter the same table.
        alone = _stands_alone(tensor) and tensor.data_ptr() not in seen
        found[name] = tensor if alone else _cpu_copy(tensor)
        seen.add(tensor.data_ptr())
    return found


def cpu_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, also of tensors that are there."""
    return {name: _cpu_copy(tensor) for name, tensor in tensors.items()}


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _stands_alone(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def _flush(directory: Path) -> None:
    """Make sure that the files are on the disk before the rename is."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
