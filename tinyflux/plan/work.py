"""What one training step of a student computes and keeps, counted without its memory.

The real model runs on fake tensors, which have shapes and no values, so the figures hold for every
config and option (checkpointing, precision) and need no formula of their own.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tinyflux.data.batches import TrainBatch
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import token_grid
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.engine import TorchEngine
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
        parameters, trainable: of the model; ``largest``: of its largest tensor.
        flops: forward and backward, what checkpointing computes again included.
        activation_bytes: that the backward pass keeps, weights in half precision included.
    """

    parameters: int
    trainable: int
    largest: int
    flops: int
    activation_bytes: int


def step_work(
    config: TinyFluxConfig, trainer: TrainerConfig, micro_batch: int, grid: tuple[int, int]
) -> StepWork:
    """Work of a micro-batch of ``grid`` (height, width) latents.

    Blocks of a kind are alike: one of each is counted, then a second, for what each more adds.
    """
    few = {kind: min(1, getattr(config, kind)) for kind in BLOCK_COUNTS}

    def count(blocks: dict[str, Any]) -> StepWork:
        return count_step(dataclasses.replace(config, **blocks), trainer, micro_batch, grid)

    first = count(few)
    total = dataclasses.asdict(first)
    for kind in BLOCK_COUNTS:
        more = getattr(config, kind) - few[kind]
        if not more:
            continue
        second = count({**few, kind: 2})
        for name in total.keys() - {"largest"}:
            total[name] += more * (getattr(second, name) - getattr(first, name))
    return StepWork(**total)


def count_step(
    config: TinyFluxConfig, trainer: TrainerConfig, micro_batch: int, grid: tuple[int, int]
) -> StepWork:
    """As :func:`step_work`, with every block of the model counted for itself."""
    tokens = token_grid(*grid, config.patch_size)
    with FakeTensorMode():
        model = TinyFluxDeep(config).train()
        if trainer.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # held, so that no other gets its address
            return tensor

        with flop_counter() as counter:
            with (
                saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast("cpu", trainer.dtype, enabled=trainer.dtype != torch.float32),
            ):
                velocity, experts = model(
                    torch.zeros(micro_batch, math.prod(tokens), config.token_channels),
                    torch.zeros(micro_batch, config.max_text_length, config.t5_hidden_size),
                    torch.zeros(micro_batch, config.pooled_projection_dim),
                    torch.zeros(micro_batch),
                    TinyFluxDeep.create_img_ids(micro_batch, *tokens),
                    return_expert_pred=True,
                    grid=tokens,
                )
                loss = sum(
                    (part.float().square().mean() for part in (velocity, *experts.values())),
                    torch.zeros(()),
                )
            size = sum(storage.nbytes() for storage in kept.values())
            loss.backward()
        counts = [parameter.numel() for parameter in model.parameters()]
        return StepWork(
            sum(counts),
            sum(parameter.numel() for parameter in model.get_trainable_parameters()),
            max(counts),
            counter.get_total_flops(),
            size,
        )


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
    engine = TorchEngine(model, trainer)
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
