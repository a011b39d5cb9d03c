"""Time each stage of the pipeline as pure torch, without Ray: ``python benchmarks/stages.py``.

Prints JSON: the machine, and samples per second of each stage on the shipped toy world.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from record import add_json_option, record

from tinyflux.cache.extract import Extractor
from tinyflux.data.batches import TrainBatch
from tinyflux.inference.sampler import Sampler
from tinyflux.model.config import ZooConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.toy.world import SHIPPED
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.step import training_loss


def rate(work: Callable[[], object], samples: int, repeats: int, device: str) -> float:
    """Samples per second: the median of ``repeats`` runs after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return round(samples / float(np.median(seconds[1:])), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    device, size, repeats = arguments.device, arguments.batch_size, arguments.repeats

    torch.manual_seed(0)
    config = preset("toy")
    world = str(SHIPPED)
    zoo = ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, device).build(config)
    pixels = np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    prompts = ["red apple"] * size
    keys = [f"{row:032x}" for row in range(size)]
    lune = Extractor(zoo, sol=False, batch_size=size)
    sol = Extractor(zoo, lune=False, batch_size=size)
    latents = zoo.encode_teacher_latents_batched(images, size)

    features = {**lune.teachers(keys, latents, prompts), **sol.teachers(keys, latents, prompts)}
    t5, pooled = zoo.encode_prompts_batched(prompts)
    batch = TrainBatch(latents, t5, pooled, torch.arange(size), **features).to(device)
    model = TinyFluxDeep(config).to(device).train()
    trainer = TrainerConfig(dtype=torch.float32)
    engine = TorchEngine(model, trainer)

    def step() -> None:
        loss = training_loss(
            model, batch, trainer, 0, None, lune.t_buckets.to(device), velocity=engine.forward
        )
        engine.backward(loss.total, last=True)
        engine.step(1e-4)

    sampler = Sampler(zoo, model, device=device, dtype=torch.float32)
    stages: dict[str, Callable[[], object]] = {
        "encode_pictures": lambda: zoo.encode_images_batched(images, size),
        "encode_prompts": lambda: zoo.encode_prompts_batched(prompts, size),
        "lune_features_10_buckets": lambda: lune.teachers(keys, latents, prompts),
        "sol_features_10_buckets": lambda: sol.teachers(keys, latents, prompts),
        "training_step": step,
        "sample_20_steps_guided": lambda: sampler.generate(
            prompts, num_steps=20, guidance_scale=2.0, height=8, width=8, seed=0
        ),
    }
    result = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "batch_size": size,
        "samples_per_second": {
            name: rate(work, size, repeats, device) for name, work in stages.items()
        },
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
