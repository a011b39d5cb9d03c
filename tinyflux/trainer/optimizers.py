"""The optimizers of a run, and their state by the names of the model's parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyflux.errors import CheckpointError, ConfigError, MissingDependencyError
from tinyflux.model.weights import misfits
from tinyflux.trainer.config import TrainerConfig

# Modules of the student whose matrices Muon takes.
BLOCKS = ("double_blocks.", "single_blocks.")


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024) makes a matrix's momentum orthogonal. Its rate is scaled so that a
    step is as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so both have one learning rate
    and one weight decay.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: list[dict[str, Any]], config: TrainerConfig
    ):
        lr, decay = config.learning_rate, config.weight_decay
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=lr, betas=config.betas, weight_decay=decay, fused=True)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.muon, self.adamw = muon, adamw
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's loader ends here, with new groups and a new state."""
        super().__setstate__(state)
        if hasattr(self, "muon"):
            self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state."""
        count = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:count]
        self.adamw.param_groups = self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.muon.step()
        self.adamw.step()


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Whether the parameter ``name`` is a matrix of the student's blocks, which Muon takes."""
    return name.startswith(BLOCKS) and len(shape) == 2


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainerConfig, names: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """The configured optimizer.

    Args:
        names: of the parameters; for ``muon`` alone.

    Raises:
        MissingDependencyError: ``adamw_8bit`` without bitsandbytes.
    """
    lr, decay = config.learning_rate, config.weight_decay
    groups = decay_groups(parameters, config)
    if config.optimizer == "muon":
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in zip(names, parameters, strict=True):
            (matrices if is_block_matrix(name, parameter.shape) else others).append(parameter)
        if not matrices or not others:  # frozen, or a student without blocks
            raise ConfigError(
                "trainer.optimizer 'muon' needs trainable matrices in blocks and parameters "
                "outside of them: use 'adamw'"
            )
        return MuonAdamW(matrices, decay_groups(others, config), config)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingDependencyError(
                "trainer.optimizer 'adamw_8bit' needs the package bitsandbytes: "
                "pip install bitsandbytes, or use 'adamw'"
            ) from error
        eight_bit: torch.optim.Optimizer = AdamW8bit(
            groups, lr=lr, betas=config.betas, weight_decay=decay
        )
        return eight_bit
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, weight_decay=decay, fused=True)


def decay_groups(parameters: Sequence[nn.Parameter], config: TrainerConfig) -> list[dict[str, Any]]:
    """An optimizer's groups of ``parameters``: one, or matrices and, undecayed, all others.

    A matrix is the weight of a linear layer, of two dimensions. The others are biases, the gains of
    norms, gates, and the per-head scales of Sol's map; the student has no embedding tables. Decay
    pulls them towards 0, where a norm's gain means nothing in particular (nanoGPT and most recipes
    leave them out).
    """
    if not config.decay_matrices_only:
        return [{"params": list(parameters)}]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def flatten_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """An optimizer's state as ``<parameter>/<key>`` tensors, as they are."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }


def restore_state(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """Inverse of :func:`flatten_state`.

    Raises:
        CheckpointError: state of another model or optimizer; nothing has changed then.
    """
    by_name: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, tensor in state.items():
        name, _, key = path.rpartition("/")
        if name not in by_name:
            raise CheckpointError(
                f"the checkpoint's optimizer state of '{name}' fits no trainable parameter: "
                "use the model config that it was made with"
            )
        by_name[name][key] = tensor
    for name, parameter in zip(names, parameters, strict=True):
        _check_state(name, by_name[name], _state_shapes(optimizer, parameter))
    # torch's own loader puts tensors on the right devices and knows which must stay on the CPU. It
    # numbers parameters as they stand in the groups.
    name_of = dict(zip(parameters, names, strict=True))
    ordered = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
    packed = optimizer.state_dict()
    packed["state"] = {
        index: {
            key: int(tensor) if key == "step" and not _keeps_step_tensor(optimizer) else tensor
            for key, tensor in by_name[name].items()
        }
        for index, name in enumerate(ordered)
        if by_name[name]
    }
    optimizer.load_state_dict(packed)


def _check_state(
    name: str, given: Mapping[str, Tensor], expected: Mapping[str, torch.Size] | None
) -> None:
    """Refuse a parameter's state with other tensors than these; a weight may have none yet."""
    if expected is None or not given:
        return
    if problems := misfits(expected, given).phrases():
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit: {name}/{problems[0]}; use the model "
            "config and the trainer.optimizer that it was made with"
        )


def _state_shapes(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, torch.Size] | None:
    """What the optimizer keeps of a parameter; None for those whose layout is their own."""
    step, shape = torch.Size(), parameter.shape
    if isinstance(optimizer, MuonAdamW):
        (by_muon,) = (group["params"] for group in optimizer.muon.param_groups)
        if any(parameter is one for one in by_muon):
            return {"momentum_buffer": shape}
    if isinstance(optimizer, torch.optim.AdamW | MuonAdamW):
        return {"step": step, "exp_avg": shape, "exp_avg_sq": shape}
    if isinstance(optimizer, torch.optim.Adafactor):
        if parameter.ndim < 2:
            return {"step": step, "variance": shape}
        rows, columns = torch.Size((*shape[:-1], 1)), torch.Size((*shape[:-2], 1, shape[-1]))
        return {"step": step, "row_var": rows, "col_var": columns}
    return None


def _keeps_step_tensor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step count is a tensor, as in torch's own optimizers."""
    return isinstance(optimizer, MuonAdamW) or type(optimizer).__module__.startswith("torch.")
