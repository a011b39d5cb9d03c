"""Checkpoints: one format for every engine and any number of workers.

A checkpoint is a directory::

    model.safetensors, config.json   the weights in fp32; load_model opens it
    ema.safetensors                  the EMA in fp32
    ema_0.05.safetensors             a power-function EMA of that length, for each that is kept
    optimizer.safetensors            <parameter>/<key>, whole tensors
    projectors.safetensors           what trainer.align trains beside the student, if anything
    trainer_state.json               step, place in the data, seed, the run's settings, and the
                                     SHA-256 of every file, itself included

Where an adapter is trained, ``adapter_model.safetensors`` and ``adapter_config.json`` stand in for
``model.safetensors``, and no file holds the weights that stay as they are.

It is written under another name and renamed when it is whole: one that can be seen is complete.
"""

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinyflux.errors import CheckpointError, DamagedCheckpointError
from tinyflux.model.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_tensors,
    has_adapter,
    read_adapter_tensors,
    save_adapter,
)
from tinyflux.model.files import CONFIG_NAME, WEIGHTS_NAME
from tinyflux.model.loader import save_config, save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import check_tensors
from tinyflux.run_dir import (
    CHECKPOINT_EMA,
    CHECKPOINT_OPTIMIZER,
    CHECKPOINT_PROJECTORS,
    length_of_track,
    track_name,
)
from tinyflux.trainer.checkpoint_state import TrainerState, read_state, write_state
from tinyflux.trainer.ema import read_shadow, save_shadow
from tinyflux.trainer.power_ema import power_decay
from tinyflux.util.files import file_sha256


@dataclass
class Checkpoint:
    """A checkpoint in memory; tensors are whole and on the CPU.

    Attributes:
        tracks: the power-function EMAs by length.
        projectors: what is trained beside the student; empty where that is nothing.
    """

    path: Path
    model: dict[str, Tensor]
    shadow: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainerState
    tracks: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    projectors: dict[str, Tensor] = field(default_factory=dict)

    def check(self, model: TinyFluxDeep) -> None:
        """Refuse a whole ``model`` that the weights or the EMA do not fit; CheckpointError."""
        tracks = ((track_name(length), track) for length, track in self.tracks.items())
        for name, tensors in ((WEIGHTS_NAME, self.model), (CHECKPOINT_EMA, self.shadow), *tracks):
            where = f"checkpoint {self.path / name}"
            check_tensors(trained_part(model, model.state_dict()), tensors, where)

    def load_model(self, model: TinyFluxDeep) -> None:
        """Put the weights into ``model``, which fits."""
        model.load_state_dict(self.model, strict=not has_adapter(model))


@dataclass
class CheckpointData:
    """What a checkpoint is written from.

    Attributes:
        model: whose config is written.
        weights: the model's whole tensors; ``shadow``: the EMA's. Of a model with an adapter its
            tensors alone are kept.
        optimizer: as of :meth:`tinyflux.trainer.engine.Engine.optimizer_state`.
        tracks: the power-function EMAs' whole tensors by length.
        projectors: the whole tensors of what is trained beside the student.
    """

    model: TinyFluxDeep
    weights: Mapping[str, Tensor]
    shadow: Mapping[str, Tensor]
    ema_decay: float
    optimizer: Mapping[str, Tensor]
    state: TrainerState
    tracks: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict)
    projectors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = trained_part(self.model, self.weights)
        self.shadow = trained_part(self.model, self.shadow)

    def snapshot(self) -> "CheckpointData":
        """Copies on the CPU, which stay as they are while the run goes on."""
        return replace(
            self,
            weights=cpu_copies(self.weights),
            shadow=cpu_copies(self.shadow),
            optimizer=cpu_copies(self.optimizer),
            state=copy.deepcopy(self.state),
            tracks={length: cpu_copies(track) for length, track in self.tracks.items()},
            projectors=cpu_copies(self.projectors),
        )


def save_checkpoint(directory: str | os.PathLike[str], contents: CheckpointData) -> None:
    """Write a whole checkpoint or, on an error, nothing.

    Raises:
        CheckpointError: it cannot be written, such as on a full disk.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_student(contents.model, partial, contents.weights)
        save_shadow(partial / CHECKPOINT_EMA, contents.shadow, contents.ema_decay, torch.float32)
        for length, track in contents.tracks.items():
            decay = power_decay(length, max(1, contents.state.step))
            save_shadow(partial / track_name(length), track, decay, torch.float32)
        save_file(_whole(contents.optimizer), partial / CHECKPOINT_OPTIMIZER)
        if contents.projectors:
            save_file(_whole(contents.projectors), partial / CHECKPOINT_PROJECTORS)
        state = replace(contents.state, files=_flushed(partial))
        write_state(partial, state)
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {directory}: {error}; earlier checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(directory: str | os.PathLike[str], verify: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        verify: read every byte once more, to compare it with what was written.

    Raises:
        DamagedCheckpointError: it is missing, cut off or altered.
        CheckpointError: it is of a later format.
    """
    directory = Path(directory)
    state = read_state(directory)
    try:
        if verify:
            _compare(directory, state)
        checkpoint = Checkpoint(
            path=directory,
            model=_read_weights(directory),
            shadow=read_shadow(directory / CHECKPOINT_EMA)[0],
            optimizer=load_file(directory / CHECKPOINT_OPTIMIZER),
            state=state,
            tracks={
                length: read_shadow(path)[0]
                for path in sorted(directory.iterdir())
                if (length := length_of_track(path.name)) is not None
            },
            projectors=_read_projectors(directory),
        )
        if verify:
            _check_numbers(checkpoint)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise DamagedCheckpointError(f"cannot read checkpoint {directory}: {error}") from error
    return checkpoint


def trained_part(model: TinyFluxDeep, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a checkpoint keeps of a model's ``tensors``: all, or its adapter's."""
    return adapter_tensors(tensors) if has_adapter(model) else tensors


def save_student(
    model: TinyFluxDeep, directory: Path, tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Write what ``load_model`` opens: the student, or its adapter alone; the files' names."""
    if not has_adapter(model):
        save_model(model, directory, tensors)
        return WEIGHTS_NAME, CONFIG_NAME
    save_adapter(model, directory, tensors)
    save_config(model, directory)
    return ADAPTER_WEIGHTS, ADAPTER_CONFIG, CONFIG_NAME


def _read_weights(directory: Path) -> dict[str, Tensor]:
    adapter = directory / ADAPTER_WEIGHTS
    return (
        read_adapter_tensors(adapter) if adapter.exists() else load_file(directory / WEIGHTS_NAME)
    )


def _read_projectors(directory: Path) -> dict[str, Tensor]:
    path = directory / CHECKPOINT_PROJECTORS
    return load_file(path) if path.exists() else {}


def _compare(directory: Path, state: TrainerState) -> None:
    """Refuse files that are not those that were written."""
    for name, written in state.files.items():
        if (read := file_sha256(directory / name)) != written:
            raise DamagedCheckpointError(
                f"{name} is not as it was written (its SHA-256 is {read[:12]}, not {written[:12]})"
            )


def _check_numbers(checkpoint: Checkpoint) -> None:
    """Refuse weights that no run can go on with.

    A moment of the optimizer may overflow, which only stops that weight.
    """
    tracks = ((track_name(length), track) for length, track in checkpoint.tracks.items())
    for name, tensors in (
        (WEIGHTS_NAME, checkpoint.model),
        (CHECKPOINT_EMA, checkpoint.shadow),
        *tracks,
        (CHECKPOINT_PROJECTORS, checkpoint.projectors),
        (CHECKPOINT_OPTIMIZER, checkpoint.optimizer),
    ):
        for key, tensor in tensors.items():
            broken = tensor.isnan() if name == CHECKPOINT_OPTIMIZER else ~tensor.isfinite()
            if broken.any():
                raise DamagedCheckpointError(f"{name} holds numbers that are not finite, in {key}")


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them.

    Those of a snapshot are it already: a second copy of them would be the largest of all.
    """
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # bitsandbytes gives every parameter the same table.
        alone = _stands_alone(tensor) and tensor.data_ptr() not in seen
        whole[name] = tensor if alone else _cpu_copy(tensor)
        seen.add(tensor.data_ptr())
    return whole


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


def _flushed(directory: Path) -> dict[str, str]:
    """SHA-256 of each file, all of which are on the disk afterwards."""
    digests = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digests[path.name] = file_sha256(path)
    return digests
