"""What one training step of a student computes and keeps, counted without its memory.

The real model runs on fake tensors, which have shapes and no values, so the figures hold for every
config and option (checkpointing, precision) and need no formula of their own.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tinyflux.data.batches import TrainBatch
from tinyflux.distributed.memory import FP32
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import token_grid
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.optimizers import is_block_matrix
from tinyflux.trainer.projectors import with_projectors
from tinyflux.trainer.step import training_loss
from tinyflux.util.buckets import default_buckets

CALIBRATION_STEPS = 3
BLOCK_COUNTS = ("num_double_layers", "num_single_layers")


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which on a CPU knows no formula for fused attention and counts nothing.

    The formulas are those that it has for a GPU's fused attention.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **others: (
                sdpa_flop_count(q, k, v)
            ),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda out, q, k, v, *rest, **others: sdpa_backward_flop_count(out, q, k, v)
            ),
        },
    )


@dataclass(frozen=True)
class StepWork:
    """Of one micro-batch on one worker.

    Attributes:
        parameters, trainable: of the model and of what is trained beside it; ``matrices``: of those
            of its blocks that are trained; ``factors``: rows' and columns' means of those that are
            trained; ``largest``: of the largest tensor.
        flops: forward and backward, what checkpointing computes again included.
        activation_bytes: that the backward pass keeps, weights in half precision included.
        projectors: parameters that are trained beside the model, and are no part of it.
    """

    parameters: int
    trainable: int
    matrices: int
    factors: int
    largest: int
    flops: int
    activation_bytes: int
    projectors: int = 0

    def moment_bytes(self, optimizer: str) -> int:
        """What ``trainer.optimizer`` keeps of all trained parameters.

        AdamW two numbers of each, in 8 bits a byte each (small tensors' fp32 left out); Muon one of
        a block's matrix and two of others; Adafactor the factors of its second moment alone.
        """
        if optimizer == "adamw_8bit":
            return 2 * self.trainable
        if optimizer == "adafactor":
            return FP32 * self.factors
        return FP32 * (2 * self.trainable - (self.matrices if optimizer == "muon" else 0))

    def checkpoint_bytes(self, trainer: TrainerConfig) -> int:
        """A checkpoint's weights, averages of the model's, and optimizer state."""
        averages = (1 + len(trainer.ema_lengths)) * (self.trainable - self.projectors)
        return FP32 * (self.parameters + averages) + self.moment_bytes(trainer.optimizer)


def step_work(
    config: TinyFluxConfig, trainer: TrainerConfig, micro_batch: int, grid: tuple[int, int]
) -> StepWork:
    """A student's work of a micro-batch of ``grid`` (height, width) latents, without projectors.

    Blocks of a kind are alike: one of each is counted, then a second, for what each more adds.
    """

    def count(few: TinyFluxConfig) -> dict[str, int]:
        return dataclasses.asdict(count_step(few, trainer, micro_batch, grid))

    return StepWork(**_by_blocks(config, count, alike={"largest"}))


def forward_flops(config: TinyFluxConfig, grid: tuple[int, int]) -> int:
    """FLOPs of one forward of one sample of ``grid`` (height, width) latents, in evaluation."""
    tokens = token_grid(*grid, config.patch_size)

    def count(few: TinyFluxConfig) -> dict[str, int]:
        with FakeTensorMode(), torch.no_grad(), flop_counter() as counter:
            TinyFluxDeep(few).eval()(*_inputs(few, 1, tokens), grid=tokens)
        return {"flops": counter.get_total_flops()}

    return _by_blocks(config, count)["flops"]


def _by_blocks(
    config: TinyFluxConfig,
    count: Callable[[TinyFluxConfig], dict[str, int]],
    alike: Collection[str] = (),
) -> dict[str, int]:
    """What ``count`` gives for the config, from models of one and two blocks of a kind.

    Args:
        alike: names of counts that more blocks do not change.
    """
    few = {kind: min(1, getattr(config, kind)) for kind in BLOCK_COUNTS}
    first = count(dataclasses.replace(config, **few))
    total = dict(first)
    for kind in BLOCK_COUNTS:
        more = getattr(config, kind) - few[kind]
        if not more:
            continue
        second = count(dataclasses.replace(config, **{**few, kind: 2}))
        for name in total.keys() - set(alike):
            total[name] += more * (second[name] - first[name])
    return total


def _inputs(config: TinyFluxConfig, count: int, tokens: tuple[int, int]) -> tuple[Tensor, ...]:
    """Zeros for a forward of ``count`` samples of ``tokens`` (high, wide)."""
    return (
        torch.zeros(count, math.prod(tokens), config.token_channels),
        torch.zeros(count, config.max_text_length, config.t5_hidden_size),
        torch.zeros(count, config.pooled_projection_dim),
        torch.zeros(count),
        TinyFluxDeep.create_img_ids(count, *tokens),
    )


def count_step(
    config: TinyFluxConfig, trainer: TrainerConfig, micro_batch: int, grid: tuple[int, int]
) -> StepWork:
    """As :func:`step_work`, with every block of the model counted for itself."""
    tokens = token_grid(*grid, config.patch_size)
    with FakeTensorMode():
        model = TinyFluxDeep(config).train()
        if trainer.gradient_checkpointing:
            model.enable_gradient_checkpointing()

        def loss() -> Tensor:
            inputs = _inputs(config, micro_batch, tokens)
            velocity, experts = model(*inputs, return_expert_pred=True, grid=tokens)
            return sum(
                (part.float().square().mean() for part in (velocity, *experts.values())),
                torch.zeros(()),
            )

        flops, size = count_loss(loss, model.parameters(), trainer.dtype)
        counts = [parameter.numel() for parameter in model.parameters()]
        return StepWork(
            sum(counts),
            sum(parameter.numel() for parameter in model.get_trainable_parameters()),
            sum(
                parameter.numel()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and is_block_matrix(name, parameter.shape)
            ),
            sum(factors(parameter.shape) for parameter in model.get_trainable_parameters()),
            max(counts),
            flops,
            size,
        )


def count_loss(
    loss: Callable[[], Tensor], weights: Iterable[nn.Parameter], dtype: torch.dtype
) -> tuple[int, int]:
    """FLOPs of a ``loss`` and its backward pass, and bytes that this one keeps.

    Args:
        loss: made in autocast to ``dtype``; on fake tensors.
        weights: which are there anyway.
    """
    there = {parameter.untyped_storage()._cdata for parameter in weights}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with flop_counter() as counter:
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            made = loss()
        size = sum(storage.nbytes() for storage in kept.values())
        made.backward()
    return counter.get_total_flops(), size


def factors(shape: torch.Size) -> int:
    """Elements of Adafactor's second moment (Shazeer and Stern 2018, arXiv:1804.04235)."""
    if len(shape) < 2:
        return shape.numel()
    return shape.numel() // shape[-1] + shape.numel() // shape[-2]


def calibrate(
    config: TinyFluxConfig,
    trainer: TrainerConfig,
    micro_batch: int,
    grid: tuple[int, int],
    device: torch.device,
) -> float:
    """Seconds that a micro-batch with the optimizer's step takes here: the median of a few."""
    trainer = dataclasses.replace(trainer, compile_mode=None)
    model = TinyFluxDeep(config).to(device).train()
    install(model)
    engine = TorchEngine(with_projectors(model, trainer), trainer)
    times, buckets = default_buckets(), len(default_buckets())
    height, width = grid
    lune = torch.randn(micro_batch, buckets, config.lune_expert_dim)
    side = config.sol_spatial_size
    batch = TrainBatch(
        latents=torch.randn(micro_batch, config.in_channels, height, width),
        t5_embeds=torch.randn(micro_batch, config.max_text_length, config.t5_hidden_size),
        clip_pooled=torch.randn(micro_batch, config.pooled_projection_dim),
        positions=torch.arange(micro_batch),
        lune=lune if trainer.enable_lune and config.use_lune_expert else None,
        sol_stats=torch.rand(micro_batch, buckets, 4) if _has_sol(config, trainer) else None,
        sol_spatial=torch.rand(micro_batch, buckets, side, side)
        if _has_sol(config, trainer)
        else None,
    ).to(device)
    spent = []
    for step in range(CALIBRATION_STEPS + 2):  # the first two warm up
        started = time.perf_counter()
        loss = training_loss(model, batch, trainer, step, None, times, engine.forward)
        engine.backward(loss.total, last=True)
        float(engine.step(trainer.learning_rate))  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - started)
    return sorted(spent[2:])[CALIBRATION_STEPS // 2]


def _has_sol(config: TinyFluxConfig, trainer: TrainerConfig) -> bool:
    return trainer.enable_sol and config.use_sol_prior
