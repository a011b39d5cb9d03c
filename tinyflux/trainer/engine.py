"""What runs a training step: backward, gradient exchange, clipping and the optimizer.

The training loop knows an :class:`Engine` only. :class:`TorchEngine` is plain torch;
``tinyflux.distributed.deepspeed`` has the other.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import as_module, plain_name
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.optimizers import build_optimizer, flatten_state, restore_state
from tinyflux.trainer.projectors import projector_tensors
from tinyflux.trainer.sharding import gather, parts_of, rank_and_world


class SkipCounter:
    """Counts optimizer steps skipped for a non-finite gradient, without waiting for the device."""

    def __init__(self, device: torch.device):
        self._total = torch.zeros((), device=device)
        self._row = torch.zeros((), device=device)
        self._longest_row = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Count one step; ``skipped`` is a bool scalar."""
        hit = skipped.to(self._total)
        self._total += hit
        self._row = (self._row + 1) * hit
        self._longest_row = torch.maximum(self._longest_row, self._row)

    def read(self) -> tuple[int, int]:
        """Skipped steps in all, and the longest uninterrupted row of them; waits."""
        total, longest = torch.stack([self._total, self._longest_row]).tolist()
        return int(total), int(longest)


class Engine(Protocol):
    """Runs the arithmetic of an optimizer step.

    It trains a module of :func:`tinyflux.trainer.projectors.with_projectors`.

    Attributes:
        model: the bare student in it, whose weights the engine keeps current and in fp32.
        device: where batches go.
        skips: the steps not taken because their gradient was not finite.
    """

    model: TinyFluxDeep
    device: torch.device
    skips: SkipCounter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward in the run's precision."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` marks the step's last micro-batch."""

    def step(self, lr: float) -> Tensor:
        """Average gradients over the workers, clip, update; the norm before clipping, a scalar.

        A non-finite gradient changes nothing and is counted in ``skips``.
        """

    def average(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the workers."""

    def shard(self) -> nn.Module | Mapping[str, Tensor]:
        """This worker's part of the model's trainable weights as they are, for its part of an EMA.

        A lone worker's part may be the whole model.
        """

    def split(self, whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This worker's part, as of :meth:`shard`, of whole tensors of the model's names."""

    def gather(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """Inverse of :meth:`split`, on rank 0; None on the others. Called by all workers."""

    def weights(self) -> Mapping[str, Tensor] | None:
        """The whole model's tensors, on rank 0; None on the others. Called by all workers."""

    def projectors(self) -> Mapping[str, Tensor] | None:
        """The whole tensors of the projectors, of which there may be none, as :meth:`weights`."""

    def optimizer_state(self) -> dict[str, Tensor] | None:
        """The whole optimizer state as ``<parameter>/<key>``, that of the projectors, too.

        Called by all workers. Only rank 0 need get it, the others may get None.
        """

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over :meth:`optimizer_state` of any engine on any number of workers."""


class TorchEngine:
    """Plain torch; with a process group of several workers, plain data parallelism."""

    def __init__(self, module: nn.Module, config: TrainerConfig):
        self.model = prepare_model(as_module(module), config)
        self.device = next(module.parameters()).device
        self.skips = SkipCounter(self.device)
        self._module, self._config = module, config
        self._names = trainable_names(self.model)  # of the EMA
        self._trained = trained_parameters(module)
        self._parameters = list(self._trained.values())
        self._rank, self._world = rank_and_world()
        self.optimizer = build_optimizer(self._parameters, config, self._trained)
        # A fused optimizer can skip a step by a flag on its device, so nothing has to wait.
        self._skips_on_device = bool(self.optimizer.defaults.get("fused"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(self.device, self._config.dtype):
            return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        if self._world > 1:
            self._average_gradients()
        limit = self._config.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        skipped = ~norm.isfinite()
        self.skips.update(skipped)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._skips_on_device:
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _average_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:  # every worker must send the same tensors
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self._world
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def average(self, values: Tensor) -> Tensor:
        return average(values)

    def shard(self) -> nn.Module | Mapping[str, Tensor]:
        if self._world == 1:
            return self.model
        return parts_of(self._trained, self._names)

    def split(self, whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return whole if self._world == 1 else parts_of(whole, self._names)

    def gather(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        if self._world == 1:
            return parts
        return gather(parts, {name: self._trained[name].shape for name in self._names})

    def weights(self) -> Mapping[str, Tensor] | None:
        return self.model.state_dict() if self._rank == 0 else None

    def projectors(self) -> Mapping[str, Tensor] | None:
        return projector_tensors(self._module.state_dict()) if self._rank == 0 else None

    def optimizer_state(self) -> dict[str, Tensor] | None:
        if self._rank != 0:
            return None
        return flatten_state(self.optimizer, list(self._trained), self._parameters)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        restore_state(self.optimizer, list(self._trained), self._parameters, state)


def average(values: Tensor) -> Tensor:
    """The mean of ``values`` over the process group, or ``values`` without one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for fp32 weights; fp32 is left alone."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_model(model: TinyFluxDeep, config: TrainerConfig) -> TinyFluxDeep:
    """``model`` with fp32 master weights, and checkpointed and compiled as configured, in place."""
    model.float()
    set_tf32(next(model.parameters()).device, config.tf32)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile_mode is not None:
        # Block by block: every block of a kind shares one compilation, and names stay.
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(mode=config.compile_mode)
    return model


def set_tf32(device: torch.device, tf32: bool | None) -> None:
    """Let fp32 products on a GPU be TF32 or not, in this process; None changes nothing.

    A CPU is left alone: torch would have it, too, work in TF32 where it can.
    """
    if tf32 is not None and device.type == "cuda":
        # Not torch.backends.cuda.matmul.fp32_precision: inductor asks for this one, and torch
        # raises where only the other was set.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an engine trains of a module, by plain name: the student's first, then projectors'."""
    named = module.named_parameters()
    return {plain_name(name): one for name, one in named if one.requires_grad}


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are not frozen, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
