"""Do the demo's pictures follow their prompts? Figures against an untrained student and chance."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyflux.cache.mixture import CacheMixture, MixSource
from tinyflux.config import RunConfig
from tinyflux.distributed.data import read_held_out
from tinyflux.model.loader import load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.serving.batch import read_picture
from tinyflux.serving.pictures import png_bytes
from tinyflux.trainer.sampling import Sampler
from tinyflux.trainer.validation import validate
from tinyflux.util.files import atomic_write

PROMPTS = 64


def nearest_share(pictures: Tensor, references: Tensor) -> dict[str, float]:
    """How often picture i ``[N, 3, H, W]`` is nearest to reference i, by squared pixel error.

    Returns:
        ``top1``, and ``top5``: its reference is among the five nearest.
    """
    distances = torch.cdist(pictures.flatten(1), references.flatten(1))
    own = distances.diagonal()[:, None]
    closer = (distances < own).sum(1)
    return {
        "top1": (closer < 1).float().mean().item(),
        "top5": (closer < 5).float().mean().item(),
    }


def evaluate(run: RunConfig) -> Path:
    """Write ``evaluation.json`` and the pictures it speaks of."""
    torch.manual_seed(run.trainer.seed)
    untrained = TinyFluxDeep(run.model).eval()
    trained = load_model(f"{run.run_dir}/final", device="cpu", dtype=torch.float32)
    data = CacheMixture([MixSource(run.cache.path)])
    held_out_rows = data.held_out(run.trainer.val_fraction)
    rows, dataset = np.flatnonzero(~held_out_rows).tolist(), data.caches[0]

    step = max(1, len(rows) // PROMPTS)
    chosen = rows[::step][:PROMPTS]
    captions, sources = dataset.captions(), dataset.sources()
    prompts = [captions[row] for row in chosen]
    folder = Path(run.data.folder)
    references = torch.stack([read_picture(folder / sources[row]) for row in chosen])

    zoo = run.zoo.build(run.model)
    shares, drawn = {}, {}
    for name, model in (("untrained", untrained), ("trained", trained)):
        sampler = Sampler(zoo, model, device="cpu", dtype=torch.float32)
        drawn[name] = sampler.generate(
            prompts,
            num_steps=run.sample.num_steps,
            guidance_scale=run.sample.guidance_scale,
            height=run.sample.height,
            width=run.sample.width,
            seed=run.sample.seed,
            negative_prompt=run.sample.negative_prompt,
        )
        shares[name] = nearest_share(drawn[name], references)
        print(
            f"{name}: {shares[name]['top1']:.0%} of {len(prompts)} pictures are nearest to their "
            f"own caption's drawing, {shares[name]['top5']:.0%} among the five nearest",
            flush=True,
        )

    output = Path(run.run_dir) / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index, (prompt, image) in enumerate(zip(prompts, drawn["trained"], strict=True)):
        name = f"{index:03d}.png"
        atomic_write(output / name, png_bytes(image))
        pictures.append({"prompt": prompt, "picture": name})

    held_out = read_held_out(data, held_out_rows)
    losses = {
        name: validate(model, held_out, run.trainer, dataset.t_buckets)
        for name, model in (("untrained", untrained), ("trained", trained))
    }
    print(
        f"held-out velocity loss: {losses['trained']['val_velocity']:.4f}, untrained "
        f"{losses['untrained']['val_velocity']:.4f}",
        flush=True,
    )
    record = {
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
        "machine": f"{os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}",
        "nearest": {"count": len(prompts), **shares, "pictures": pictures},
        "held_out": {"count": int(held_out_rows.sum()), **losses},
    }
    path = Path(run.run_dir) / "evaluation.json"
    atomic_write(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


def _processor() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
