"""Train the toy world that ships with the package: ``python -m tinyflux.toy.train_world OUT``.

Three stages on all OpenMoji drawings of 32 x 32 px, fp32 on the CPU, each from its own seed:

1. the VAE (L1 + L2 reconstruction, a light KL term);
2. Lune and the CLIP text model together, by rectified flow on the VAE's latents;
3. Sol, another UNet from another seed, by the same flow with CLIP frozen.

The teachers keep their own time convention: ``sigma = 1`` is noise, the target is
``noise - data`` and the UNet is told ``1000 * sigma``. T5 keeps its random weights, so its hidden
states are a fixed random map of the caption's tokens. Weights are stored in fp16. ``world.json``
records seed, steps, time and figures; a stage that it lists is not trained again.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from tinyflux.toy.openmoji import draw, list_emoji
from tinyflux.toy.world import WorldSizes, build_untrained
from tinyflux.util.files import atomic_write
from tinyflux.util.logging import log_to_console
from tinyflux.util.seeding import generator

PICTURE_SIZE = 32
RECORD = "world.json"

logger = logging.getLogger(__name__)


def _cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 2%."""
    return min(1.0, (step + 1) / warmup) * (
        0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
    )


def _fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    lr: float,
    figure: Callable[[], str],
) -> float:
    """Run AdamW for ``steps``; logs progress with ``figure`` and returns seconds taken."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _cosine(step, steps)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            logger.info("%s %d/%d, %.0f s, %s", name, step + 1, steps, seconds, figure())
    return time.monotonic() - started


def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Signal-to-noise ratio in dB of ``pictures`` ``[N, 3, H, W]`` in [-1, 1] through ``vae``."""
    with torch.no_grad():
        error = F.mse_loss(vae(pictures).sample.clamp(-1, 1) / 2, pictures / 2)
    return -10 * math.log10(error.item())


def train_vae(vae: AutoencoderKL, pictures: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Fit ``vae`` and set its shift and scaling so that latents have mean 0 and deviation 1."""
    vae.train().to(memory_format=torch.channels_last)
    random = generator(seed, "vae")

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (16,), generator=random)
        batch = pictures[chosen].to(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample(random)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = F.l1_loss(output, batch) + F.mse_loss(output, batch) + 1e-3 * kl
        return loss

    seconds = _fit(
        "VAE",
        list(vae.parameters()),
        loss_of_step,
        steps,
        lr=1.2e-3,
        figure=lambda: f"PSNR {psnr(vae, pictures[::8]):.2f} dB",
    )
    # What is stored is what the teachers are trained on.
    vae.eval().half().float().to(memory_format=torch.contiguous_format)
    latents = encode(vae, pictures)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    return {"steps": steps, "seconds": round(seconds), "psnr_db": round(psnr(vae, pictures), 2)}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Unscaled posterior modes ``[N, C, h, w]``."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(64)])


def train_teacher(
    name: str,
    unet: UNet2DConditionModel,
    clip: CLIPTextModel,
    tokens: Tensor,
    latents: Tensor,
    steps: int,
    seed: int,
    train_clip: bool,
) -> dict[str, float]:
    """Fit one teacher by rectified flow, ``sigma = 1`` being noise.

    Args:
        tokens: ``[N + 1, T]`` CLIP token ids; the last row is the empty caption's.
        latents: ``[N, C, h, w]``, scaled.
    """
    unet.train()
    clip.train(train_clip).requires_grad_(train_clip)
    random = generator(seed, name)
    recent: list[float] = []
    parameters = [*unet.parameters(), *(clip.parameters() if train_clip else ())]

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(len(latents), (64,), generator=random)
        data = latents[chosen]
        noise = torch.randn(data.shape, generator=random)
        sigma = torch.rand(len(chosen), generator=random)
        level = sigma[:, None, None, None]
        # A tenth of the captions are dropped, as in SD1.5's training.
        dropped = torch.rand(len(chosen), generator=random) < 0.1
        captions = torch.where(dropped, len(latents), chosen)
        text = clip(tokens[captions]).last_hidden_state
        noised = (1 - level) * data + level * noise
        loss = F.mse_loss(unet(noised, 1000 * sigma, text).sample, noise - data)
        recent.append(loss.item())
        return loss

    seconds = _fit(
        name,
        parameters,
        loss_of_step,
        steps,
        lr=1e-3,
        figure=lambda: f"loss {np.mean(recent[-250:]):.4f}",
    )
    unet.eval().half().float()
    clip.eval().half().float()
    return {
        "steps": steps,
        "seconds": round(seconds),
        "loss_first_250": round(float(np.mean(recent[:250])), 4),
        "loss_last_250": round(float(np.mean(recent[-250:])), 4),
    }


@dataclass
class WorldFolder:
    """A toy world that is being trained, on disk.

    Attributes:
        record: what ``world.json`` holds: the seed and each finished stage's figures.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, path: Path, captions: list[str], seed: int) -> "WorldFolder":
        """The world at ``path``, which is begun with random weights where there is none."""
        if (path / RECORD).exists():
            return cls(path, json.loads((path / RECORD).read_text()))
        torch.manual_seed(seed)
        build_untrained(path, captions, seed, WorldSizes())
        t5 = T5EncoderModel.from_pretrained(path / "t5", dtype=torch.float16)
        t5.save_pretrained(path / "t5")
        return cls(path, {"seed": seed, "pictures": len(captions), "picture_size": PICTURE_SIZE})

    def finish(self, stage: str, figures: dict[str, float], **models: Any) -> None:
        """Store a stage's ``models`` in fp16 in folders of their names, then record the stage."""
        for folder, model in models.items():
            model.half().save_pretrained(self.path / folder)
            model.float()
        self.record[stage] = figures
        atomic_write(self.path / RECORD, (json.dumps(self.record, indent=2) + "\n").encode())


def finished_vae(world: WorldFolder, pictures: Tensor, steps: int, seed: int) -> AutoencoderKL:
    """The world's VAE, trained for ``steps`` if it is not yet."""
    vae = AutoencoderKL.from_pretrained(world.path / "vae", torch_dtype=torch.float32)
    if "vae" not in world.record:
        figures = train_vae(vae, pictures, steps, seed)
        world.finish("vae", figures, vae=vae)
    return vae.eval()


def finish_teachers(
    world: WorldFolder, captions: list[str], latents: Tensor, steps: dict[str, int], seed: int
) -> None:
    """Train the teachers that are not trained yet: Lune with CLIP, then Sol."""
    tokenizer = CLIPTokenizer.from_pretrained(world.path / "clip")
    tokens = tokenizer(
        [*captions, ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    clip = CLIPTextModel.from_pretrained(world.path / "clip", dtype=torch.float32)
    for stage in ("lune", "sol"):
        if stage in world.record:
            continue
        unet = UNet2DConditionModel.from_pretrained(world.path / stage, torch_dtype=torch.float32)
        figures = train_teacher(
            stage,
            unet,
            clip,
            tokens,
            latents,
            steps[stage],
            seed + (stage == "sol"),
            train_clip=stage == "lune",
        )
        trained = {"lune": unet, "clip": clip} if stage == "lune" else {"sol": unet}
        world.finish(stage, figures, **trained)


def main() -> None:
    """Train what is missing of the world in the folder that the command line names."""
    arguments = _arguments()
    log_to_console()
    emoji = list_emoji()
    captions = [one.caption for one in emoji]
    drawn = np.stack([np.asarray(draw(one, PICTURE_SIZE)) for one in emoji])
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    world = WorldFolder.open(arguments.out, captions, arguments.seed)
    vae = finished_vae(world, pictures, arguments.vae_steps, arguments.seed)
    latents = (encode(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    steps = {"lune": arguments.lune_steps, "sol": arguments.sol_steps}
    finish_teachers(world, captions, latents, steps, arguments.seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of the world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=9000)
    parser.add_argument("--lune-steps", type=int, default=2500)
    parser.add_argument("--sol-steps", type=int, default=1200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
