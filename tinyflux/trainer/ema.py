"""Exponential moving average of a model's weights."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tinyflux.errors import CheckpointError, ConfigError, TrainingError
from tinyflux.model.weights import check_tensors, plain_name
from tinyflux.util.files import atomic_write


class EMA:
    """``shadow = decay * shadow + (1 - decay) * weight``, kept in fp32 beside the model.

    Trainable parameters are averaged; frozen parameters and buffers are kept equal to the model's.
    Names are the plain model's, whether it is compiled or wrapped.

    In place of the model there may be tensors by name, all of which are averaged: one worker's
    parts of the parameters. :meth:`apply_shadow` and the like need a model.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ConfigError(f"the EMA's decay must be at least 0 and below 1, not {decay}")
        self.decay = decay
        self.shadow = {
            name: tensor.detach().to(_shadow_dtype(tensor), copy=True)
            for name, tensor in _tensors(model).items()
        }
        self._backup: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module | Mapping[str, Tensor], decay: float | None = None) -> None:
        """Move the shadow towards the model's weights.

        Args:
            decay: of this update alone, as in a warm-up; left out, :attr:`decay`.
        """
        averaged: list[Tensor] = []
        weights: list[Tensor] = []
        everything = isinstance(model, Mapping)
        for name, tensor in _tensors(model).items():
            shadow = self.shadow[name]
            if everything or tensor.requires_grad:
                averaged.append(shadow)
                weights.append(tensor.detach().to(shadow.device, shadow.dtype))
            else:
                shadow.copy_(tensor)
        if averaged:
            torch._foreach_lerp_(averaged, weights, 1 - (self.decay if decay is None else decay))

    @torch.no_grad()
    def apply_shadow(self, model: nn.Module) -> None:
        """Put the shadow into the model, keeping its own weights for :meth:`restore`."""
        if self._backup is not None:
            raise TrainingError("the EMA is already applied: restore the model's weights first")
        self._backup = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        self.copy_to(model)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Undo :meth:`apply_shadow`."""
        if self._backup is None:
            raise TrainingError("there is nothing to restore: the EMA is not applied")
        for name, tensor in _tensors(model).items():
            tensor.copy_(self._backup[name])
        self._backup = None

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the shadow."""
        for name, tensor in _tensors(model).items():
            tensor.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """``{"decay": float, "shadow": {name: tensor}}``; the tensors are the EMA's own."""
        return {"decay": self.decay, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            CheckpointError: tensors that are missing, unknown or of another shape.
        """
        if set(state) != {"decay", "shadow"}:
            raise CheckpointError(
                "an EMA's state must hold 'decay' and 'shadow', "
                f"not {', '.join(sorted(map(str, state))) or 'nothing'}"
            )
        check_tensors(self.shadow, state["shadow"], "the EMA's state")
        self.decay = float(state["decay"])
        for name, shadow in self.shadow.items():
            shadow.copy_(state["shadow"][name])

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the shadow as safetensors in ``dtype`` (fp32 loses nothing)."""
        save_shadow(path, self.shadow, self.decay, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> "EMA":
        """Read what :meth:`save` wrote, for ``model``.

        Raises:
            CheckpointError: a file that is missing, damaged or made for another model.
        """
        shadow, decay = read_shadow(path)
        ema = cls(model, decay)
        check_tensors(ema.shadow, shadow, str(path))
        ema.load_state_dict({"decay": decay, "shadow": shadow})
        return ema


def save_shadow(
    path: str | os.PathLike[str], shadow: Mapping[str, Tensor], decay: float, dtype: torch.dtype
) -> None:
    """Write an EMA's whole tensors as safetensors, floating ones in ``dtype``."""
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in shadow.items()
    }
    atomic_write(path, save(tensors, metadata={"ema": json.dumps({"decay": decay})}))


def read_shadow(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], float]:
    """The tensors and the decay in a file of :func:`save_shadow`.

    Raises:
        CheckpointError: a file that is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shadow = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the EMA file {path}: {error}") from error
    if "ema" not in metadata:
        raise CheckpointError(f"{path} was not written by EMA.save: it holds no decay")
    return shadow, json.loads(metadata["ema"])["decay"]


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters and persistent buffers by plain name."""
    if isinstance(model, Mapping):
        return model
    return {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items()}


def _shadow_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
