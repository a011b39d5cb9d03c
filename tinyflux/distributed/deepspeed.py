"""DeepSpeed ZeRO under the training loop."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyflux.distributed.memory import bucket_elements
from tinyflux.distributed.zero_state import ZeroState
from tinyflux.errors import ConfigError, MissingDependencyError
from tinyflux.model.weights import as_module, plain_name
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import (
    SkipCounter,
    autocast,
    average,
    prepare_model,
    trainable_names,
    trained_parameters,
)
from tinyflux.trainer.optimizers import build_optimizer
from tinyflux.trainer.projectors import projector_tensors
from tinyflux.trainer.sharding import gather, part_size, parts_of, rank_and_world


def check_zero(config: TrainerConfig, zero_stage: int, offload: bool = False) -> None:
    """Refuse what this engine cannot do with a :class:`ConfigError`."""
    if zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"workers.zero_stage must be 0, 1, 2 or 3, not {zero_stage}")
    if offload and zero_stage == 0:
        raise ConfigError(
            "workers.offload needs workers.zero_stage 1, 2 or 3: stage 0 leaves the optimizer's "
            "state beside the weights"
        )
    if config.adapter is not None:
        raise ConfigError(
            "trainer.adapter does not run under DeepSpeed, which would have next to nothing to "
            "shard: set workers.engine to 'torch'"
        )
    if config.optimizer != "adamw":
        raise ConfigError(
            f"trainer.optimizer '{config.optimizer}' does not run under DeepSpeed, which shards "
            "flat tensors: use 'adamw', or workers.engine 'torch'"
        )


class DeepSpeedEngine:
    """An :class:`tinyflux.trainer.engine.Engine` on DeepSpeed ZeRO 0, 1, 2 or 3.

    A process group must exist. Weights are fp32; the forward runs under autocast as in plain torch,
    so DeepSpeed's own half precision stays off.

    Args:
        zero_stage: what is sharded: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights
            too, so that ``module`` holds none of them between steps.
        offload: keep the optimizer's state in CPU memory.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainerConfig,
        zero_stage: int = 2,
        offload: bool = False,
    ):
        check_zero(config, zero_stage, offload)
        try:
            import deepspeed
        except ImportError as error:
            raise MissingDependencyError(
                "workers.engine 'deepspeed' needs the package deepspeed: pip install deepspeed, "
                "or use 'torch'"
            ) from error
        self.model = prepare_model(as_module(module), config)
        self.device = next(module.parameters()).device
        self.skips = SkipCounter(self.device)
        self._module = module
        self._config, self._stage, self._offload = config, zero_stage, offload
        self._names = trainable_names(self.model)  # of the EMA
        trained = trained_parameters(module)
        self._parameters = list(trained.values())
        self._shapes = {plain_name(name): one.shape for name, one in module.named_parameters()}
        # Its collective for inference on CPUs, which nothing here calls, would be compiled at every
        # node's first start, under a lock file that outlives a killed process and then blocks all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Wraps the process group that is there; DeepSpeed's calls need it.
        deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)
        with _broadcast_scalars(module, widen=zero_stage == 3):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=_Autocast(module, self.device, config.dtype),
                model_parameters=self._parameters,
                optimizer=build_optimizer(self._parameters, config),
                config=self._settings(),
                dist_init_required=False,
            )
        self._state = ZeroState(
            self._optimizer, list(trained), self._parameters, self._shapes, zero_stage
        )

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's config. Accumulation is the loop's, told by ``backward(last=)``."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # only for DeepSpeed's own throughput figures
            "gradient_accumulation_steps": 1,
            # Stage 0 would clip without looking for NaNs, so this engine does it there.
            "gradient_clipping": self._config.grad_clip if self._stage else 0.0,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": self.device.type == "cuda",
                "contiguous_gradients": True,
                **self._buckets(),
                **({"offload_optimizer": {"device": "cpu"}} if self._offload else {}),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            # It would wait for the device twice in each micro-batch.
            "timers": {"throughput": {"enabled": False}},
        }

    def _buckets(self) -> dict[str, int]:
        """Sizes of DeepSpeed's buffers, in elements.

        Its own defaults are made for models a hundred times larger: each buffer would hold all of
        this one, and ZeRO-3 would never let go of a weight.
        """
        sizes = [shape.numel() for shape in self._shapes.values()]
        bucket = bucket_elements(max(sizes), sum(sizes))
        sizes_of = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
        live = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
        return {**dict.fromkeys(sizes_of, bucket), **dict.fromkeys(live, 2 * bucket)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            norm = nn.utils.clip_grad_norm_(
                self._parameters, self._config.grad_clip or float("inf")
            )
            skipped = ~norm.isfinite()
            self._optimizer.found_inf = skipped.float()  # as in plain torch: fused AdamW
            self._engine.step()
        else:
            # DeepSpeed itself reads the norm, to know whether it is finite.
            self._engine.step()
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
            norm = norm.float().reshape(())
            skipped = torch.full((), bool(self._optimizer.overflow), device=self.device)
        self.skips.update(skipped)
        return norm

    def average(self, values: Tensor) -> Tensor:
        return average(values)

    def shard(self) -> Mapping[str, Tensor]:
        return self._parts(self._names)

    def _parts(self, names: Iterable[str]) -> dict[str, Tensor]:
        """This worker's parts of parameters, as they are now."""
        parameters = {plain_name(name): one for name, one in self._module.named_parameters()}
        if self._stage < 3:
            return parts_of(parameters, names)
        rank, world = rank_and_world()
        return {
            # DeepSpeed's shard is padded to the same length on every worker.
            name: parameters[name].ds_tensor[: part_size(self._shapes[name], rank, world)]  # type: ignore[attr-defined]
            for name in names
        }

    def split(self, whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return parts_of(whole, self._names)

    def gather(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return gather(parts, {name: self._shapes[name] for name in self._names})

    def weights(self) -> Mapping[str, Tensor] | None:
        if self._stage < 3:
            return self.model.state_dict() if dist.get_rank() == 0 else None
        whole = self._gathered([name for name, _ in self.model.named_parameters()])
        # Buffers are whole on every worker.
        return whole and {n: whole.get(n, t) for n, t in self.model.state_dict().items()}

    def projectors(self) -> Mapping[str, Tensor] | None:
        if self._stage < 3:
            return projector_tensors(self._module.state_dict()) if dist.get_rank() == 0 else None
        return self._gathered(list(projector_tensors(self._shapes)))

    def _gathered(self, names: Sequence[str]) -> dict[str, Tensor] | None:
        return gather(self._parts(names), {name: self._shapes[name] for name in names})

    def optimizer_state(self) -> dict[str, Tensor] | None:
        return self._state.whole()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        self._state.load(state)


@contextmanager
def _broadcast_scalars(module: nn.Module, widen: bool) -> Iterator[None]:
    """Send rank 0's scalars to all and keep DeepSpeed from it.

    DeepSpeed sends its tensors as bytes, and torch cannot view a 0-d tensor so. ZeRO-3 insists on
    it, so there scalars become ``[1]``, which broadcasts alike.
    """
    scalars = [parameter for parameter in module.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        if widen:
            parameter.data = parameter.data.reshape(1)
        dist.broadcast(parameter.data, 0)
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in scalars:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


class _Autocast(nn.Module):
    """The module under autocast from the inside: DeepSpeed turns off one that surrounds it."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.module = module
        self._device, self._dtype = device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(self._device, self._dtype):
            return self.module(*args, **kwargs)
