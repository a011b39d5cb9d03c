"""AdamW's state under DeepSpeed ZeRO: whole for a checkpoint, and from one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.errors import CheckpointError
from tinyflux.trainer.optimizers import flatten_state, restore_state
from tinyflux.trainer.sharding import gather, padded_part, part, part_size, rank_and_world

# What AdamW keeps for each element of a weight.
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """Reads and writes the state of an AdamW that DeepSpeed drives.

    Its form is that of :func:`tinyflux.trainer.optimizers.flatten_state`, so that a checkpoint
    goes from any stage and number of workers to any other, and to plain torch.

    Args:
        optimizer: what ``deepspeed.initialize`` returned.
        names, parameters: the trained ones, in the same order.
        shapes: whole shapes by name, which stage 3's parameters themselves do not have.
        stage: 0, 1, 2 or 3.
    """

    def __init__(
        self,
        optimizer: Any,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        shapes: Mapping[str, torch.Size],
        stage: int,
    ):
        self._optimizer, self._stage = optimizer, stage
        self._names, self._parameters, self._shapes = names, parameters, shapes

    def whole(self) -> dict[str, Tensor] | None:
        """The state of every parameter, on rank 0 (None on others); called by all workers."""
        main = dist.get_rank() == 0
        if self._stage == 0:
            if not main:
                return None
            return flatten_state(self._inner(), self._names, self._parameters)
        steps = self._step_count()
        if steps is None:
            return {} if main else None
        moments = {key: self._whole_moment(key) or {} for key in MOMENTS}
        if not main:
            return None
        return {
            **{f"{n}/{key}": tensor for key in MOMENTS for n, tensor in moments[key].items()},
            **{f"{name}/step": torch.tensor(float(steps)) for name in self._names},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a whole ``state``; an empty one is that before the first step.

        Raises:
            CheckpointError: a parameter's state is missing; nothing was changed then.
        """
        if not state:
            return
        if self._stage == 0:
            restore_state(self._inner(), self._names, self._parameters, state)
            return
        self._check(state)
        self._create_moments(float(state[f"{self._names[0]}/step"]))
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for key in MOMENTS:
                self._set_moment(parameter, key, state[f"{name}/{key}"].to(parameter.device))

    def _check(self, state: Mapping[str, Tensor]) -> None:
        keys = (f"{name}/{key}" for name in self._names for key in (*MOMENTS, "step"))
        missing = next((key for key in keys if key not in state), None)
        if missing:
            raise CheckpointError(
                f"the checkpoint's optimizer state has no '{missing}': it was made with another "
                "optimizer or model; start a new run_dir or use the config it was made with"
            )

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 3:
            # DeepSpeed's own cut of a whole tensor fails where it does not divide evenly.
            rank, world = rank_and_world()
            mine = padded_part(part(value, rank, world), value.shape, world)
            safe_set_local_optimizer_state(parameter, mine, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _whole_moment(self, key: str) -> dict[str, Tensor] | None:
        """AdamW's ``key`` of every parameter, on rank 0; called by all workers."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        by_name = dict(zip(self._names, self._parameters, strict=True))
        if self._stage == 3:
            rank, world = rank_and_world()
            parts = {
                name: safe_get_local_optimizer_state(parameter, key)[
                    : part_size(self._shapes[name], rank, world)
                ]
                for name, parameter in by_name.items()
            }
            return gather(parts, {name: self._shapes[name] for name in self._names})
        self._link_moments()
        whole: dict[str, Tensor] = {}
        for name, parameter in by_name.items():
            tensor = safe_get_full_optimizer_state(parameter, key)
            if dist.get_rank() == 0:
                whole[name] = tensor.detach().cpu()
        return whole

    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that DeepSpeed drives; under ZeRO its parameters are this worker's shards."""
        inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    def _step_count(self) -> float | None:
        """Steps that AdamW has made, None before the first."""
        states = list(self._inner().state.values())
        return float(states[0]["step"]) if states else None

    def _create_moments(self, steps: float) -> None:
        """What AdamW's first step would create, so that it can be filled before."""
        inner = self._inner()
        if self._stage == 3:
            shards = self._optimizer.fp32_partitioned_groups_flat
        else:
            shards = [shard for group in inner.param_groups for shard in group["params"]]
        for shard in shards:
            inner.state[shard] = {
                "step": torch.tensor(steps, dtype=torch.float32, device=shard.device),
                **{key: torch.zeros_like(shard) for key in MOMENTS},
            }
        if self._stage < 3:
            self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed's calls find the moments of every group of parameters.

        It links them once, after the first group's step, when the others have none yet.
        """
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
