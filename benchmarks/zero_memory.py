"""Peak memory of a training worker by ZeRO stage: ``python benchmarks/zero_memory.py``.

Two workers (processes on this machine, gloo) train a wide toy preset on one small synthetic batch
each. A worker's figure is the growth of its resident memory from before its model was built to the
peak within steps 3 to 5, so neither torch itself nor what only the start needs is in it. The
prediction is ``tinyflux.distributed.memory.worker_bytes``, without activations. Prints JSON with
measured over predicted, and each stage over stage 0.
"""

import argparse
import dataclasses
import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from record import add_json_option, record
from torch.multiprocessing.spawn import spawn

from tinyflux.data.batches import StepData, TrainBatch
from tinyflux.distributed.deepspeed import DeepSpeedEngine
from tinyflux.distributed.memory import worker_bytes
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.loop import TrainLoop
from tinyflux.util.buckets import default_buckets

CONFIG = TrainerConfig(
    gradient_accumulation=1, enable_lune=False, enable_sol=False, dtype=torch.float32
)


def student(width: int) -> TinyFluxConfig:
    """The toy preset, ``width`` wide."""
    config = preset("toy")
    heads = width // config.attention_head_dim
    return dataclasses.replace(config, hidden_size=width, num_attention_heads=heads)


def status(name: str) -> int:
    """A figure of this process's memory in bytes: ``VmRSS`` or, at its peak, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def worker(rank: int, world: int, port: int, stage: int, width: int, result: str) -> None:
    """Train a few steps; rank 0 writes the growth of its memory to ``result``."""
    os.environ.update(
        DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank),
        WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = student(width)
    # What torch and DeepSpeed take for themselves comes with the first use: not part of the figure.
    warm = DeepSpeedEngine(TinyFluxDeep(student(64)), CONFIG, stage)
    train(warm, student(64), steps=1)
    del warm
    before = status("VmRSS")
    torch.manual_seed(0)
    model = TinyFluxDeep(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = DeepSpeedEngine(model, CONFIG, stage)
    loop = train(engine, config, steps=2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    train(engine, config, steps=3, loop=loop)
    if rank == 0:
        found = {"parameters": parameters, "bytes": status("VmHWM") - before}
        Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


def train(
    engine: DeepSpeedEngine, config: TinyFluxConfig, steps: int, loop: TrainLoop | None = None
) -> TrainLoop:
    """Some steps on one sample of 4 x 4 latents."""
    if loop is None:
        ema = EMA(engine.shard(), CONFIG.ema_decay)
        loop = TrainLoop(engine, CONFIG, TrainerState(), ema, None, default_buckets())
    batch = TrainBatch(
        latents=torch.randn(1, config.in_channels, 4, 4),
        t5_embeds=torch.randn(1, config.max_text_length, config.t5_hidden_size),
        clip_pooled=torch.randn(1, config.pooled_projection_dim),
        positions=torch.zeros(1, dtype=torch.int64),
    )
    for _ in range(steps):
        loop.step(StepData([batch], 0, 0, 0, size=dist.get_world_size()))
    return loop


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--workers", type=int, default=2)
    add_json_option(parser)
    arguments = parser.parse_args()
    stages: dict[str, dict[str, float]] = {}
    parameters = 0
    for stage in range(4):
        with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            result = f"{folder}/result.json"
            spawn(
                worker,
                (arguments.workers, port, stage, arguments.width, result),
                nprocs=arguments.workers,
            )
            found = json.loads(Path(result).read_text())
        parameters = found["parameters"]
        predicted = sum(worker_bytes(parameters, arguments.workers, stage).values())
        stages[f"zero{stage}"] = {
            "measured_mib": round(found["bytes"] / 2**20, 1),
            "predicted_mib": round(predicted / 2**20, 1),
            "measured_over_predicted": round(found["bytes"] / predicted, 3),
        }
    first = stages["zero0"]["measured_mib"]
    for figures in stages.values():
        figures["over_zero0"] = round(figures["measured_mib"] / first, 3)
    record({
        "workers": arguments.workers,
        "parameters": parameters,
        **stages,
    }, arguments.json)  # fmt: skip


if __name__ == "__main__":
    main()
