"""Train the toy world that ships with the package: ``python -m tinyflux.toy.train_world OUT``.

Three stages on the ``train`` split of the toy pictures (:mod:`tinyflux.toy.icons`) alone, fp32 on
the CPU, each from its own seed:

1. the VAE (L1 + L2 reconstruction, a light KL term);
2. Lune and the CLIP text model together, by rectified flow on the VAE's latents;
3. Sol, another UNet from another seed, by the same flow with CLIP frozen.

The teachers keep their own time convention: ``sigma = 1`` is noise, the target is
``noise - data`` and the UNet is told ``1000 * sigma``. T5 keeps its random weights, so its hidden
states are a fixed random map of the caption's tokens. Weights are stored in fp16. ``world.json``
records seed, steps, time and figures on every split, so that what was only remembered can be told
from what was learnt; a stage that it lists is not trained again.
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

from tinyflux.toy.icons import SHIPPED, SHIPPED_SIZE, SPLITS, TRAIN, read_icons
from tinyflux.toy.world import WorldSizes, build_untrained
from tinyflux.util.files import atomic_write
from tinyflux.util.images import read_picture
from tinyflux.util.logging import log_to_console
from tinyflux.util.seeding import generator

RECORD = "world.json"
# Pictures of each split that the teachers' figures are taken on, and their seed.
JUDGED = 512
JUDGED_SEED = 1000

logger = logging.getLogger("tinyflux.toy.train_world")  # run as __main__

# A stage's figures; those of quality are by split.
Figures = dict[str, float | dict[str, float]]


@dataclass
class Split:
    """Captioned pictures of one split.

    Attributes:
        captions: ``N`` of them.
        pictures: ``[N, 3, H, W]`` in [-1, 1].
    """

    captions: list[str]
    pictures: Tensor


def read_split(split: str) -> Split:
    """A split of the pictures that ship."""
    icons = read_icons(SHIPPED, split)
    pictures = torch.stack([read_picture(icon.png) for icon in icons])
    return Split([icon.caption for icon in icons], 2 * pictures - 1)


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


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Signal-to-noise ratio in dB of ``pictures`` ``[N, 3, H, W]`` in [-1, 1] through ``vae``."""
    errors = [
        F.mse_loss(vae(batch).sample.clamp(-1, 1) / 2, batch / 2, reduction="sum").item()
        for batch in pictures.split(64)
    ]
    return -10 * math.log10(sum(errors) / pictures.numel())


def train_vae(vae: AutoencoderKL, splits: dict[str, Split], steps: int, seed: int) -> Figures:
    """Fit ``vae`` and set its shift and scaling so that latents have mean 0 and deviation 1."""
    vae.train().to(memory_format=torch.channels_last)
    random = generator(seed, "vae")
    pictures = splits[TRAIN].pictures

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
        figure=lambda: f"PSNR {psnr(vae, pictures[::32]):.2f} dB",
    )
    # What is stored is what the teachers are trained on.
    vae.eval().half().float().to(memory_format=torch.contiguous_format)
    latents = encode(vae, pictures)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    quality = {name: round(psnr(vae, split.pictures), 2) for name, split in splits.items()}
    return {"steps": steps, "seconds": round(seconds), "psnr_db": quality}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Unscaled posterior modes ``[N, C, h, w]``."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(64)])


@dataclass
class TeacherData:
    """What teachers learn from, or are judged on.

    Attributes:
        tokens: ``[N + 1, T]`` CLIP token ids; the last row is the empty caption's.
        latents: ``[N, C, h, w]``, scaled.
    """

    tokens: Tensor
    latents: Tensor

    def loss(
        self, unet: UNet2DConditionModel, text: Tensor, chosen: Tensor, random: torch.Generator
    ) -> Tensor:
        """Velocity loss at the ``chosen`` latents, told ``text``; ``sigma = 1`` is noise."""
        data = self.latents[chosen]
        noise = torch.randn(data.shape, generator=random)
        sigma = torch.rand(len(chosen), generator=random)
        level = sigma[:, None, None, None]
        noised = (1 - level) * data + level * noise
        return F.mse_loss(unet(noised, 1000 * sigma, text).sample, noise - data)


def train_teacher(
    name: str,
    unet: UNet2DConditionModel,
    clip: CLIPTextModel,
    data: dict[str, TeacherData],
    steps: int,
    seed: int,
    train_clip: bool,
) -> Figures:
    """Fit one teacher by rectified flow on the ``train`` split of ``data``."""
    unet.train()
    clip.train(train_clip).requires_grad_(train_clip)
    random = generator(seed, name)
    recent: list[float] = []
    parameters = [*unet.parameters(), *(clip.parameters() if train_clip else ())]
    train = data[TRAIN]
    count = len(train.latents)

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(count, (64,), generator=random)
        # A tenth of the captions are dropped, as in SD1.5's training.
        dropped = torch.rand(len(chosen), generator=random) < 0.1
        captions = torch.where(dropped, count, chosen)
        text = clip(train.tokens[captions]).last_hidden_state
        loss = train.loss(unet, text, chosen, random)
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
        "velocity_loss": {
            name: judge_teacher(unet, clip, split, captioned=True) for name, split in data.items()
        },
        "velocity_loss_without_captions": {
            name: judge_teacher(unet, clip, split, captioned=False) for name, split in data.items()
        },
    }


@torch.no_grad()
def judge_teacher(
    unet: UNet2DConditionModel, clip: CLIPTextModel, data: TeacherData, captioned: bool
) -> float:
    """Velocity loss at :data:`JUDGED` pictures, with their captions or the empty one.

    Noise and times are the same for every teacher and either way of captioning.
    """
    random = generator(JUDGED_SEED, "judge")
    count = len(data.latents)
    losses = []
    for chosen in torch.randperm(count, generator=random)[:JUDGED].split(64):
        captions = chosen if captioned else torch.full_like(chosen, count)
        text = clip(data.tokens[captions]).last_hidden_state
        losses.append(data.loss(unet, text, chosen, random).item() * len(chosen))
    return round(sum(losses) / min(JUDGED, count), 4)


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
        return cls(path, {"seed": seed, "picture_size": SHIPPED_SIZE})

    def finish(self, stage: str, figures: Figures, **models: Any) -> None:
        """Store a stage's ``models`` in fp16 in folders of their names, then record the stage."""
        for folder, model in models.items():
            model.half().save_pretrained(self.path / folder)
            model.float()
        self.record[stage] = figures
        atomic_write(self.path / RECORD, (json.dumps(self.record, indent=2) + "\n").encode())


def finished_vae(
    world: WorldFolder, splits: dict[str, Split], steps: int, seed: int
) -> AutoencoderKL:
    """The world's VAE, trained for ``steps`` if it is not yet."""
    vae = AutoencoderKL.from_pretrained(world.path / "vae", torch_dtype=torch.float32)
    if "vae" not in world.record:
        figures = train_vae(vae, splits, steps, seed)
        world.finish("vae", figures, vae=vae)
    return vae.eval()


def teacher_data(
    world: WorldFolder, vae: AutoencoderKL, splits: dict[str, Split]
) -> dict[str, TeacherData]:
    """Every split as the teachers see it: tokens and scaled latents."""
    tokenizer = CLIPTokenizer.from_pretrained(world.path / "clip")
    data = {}
    for name, split in splits.items():
        tokens = tokenizer(
            [*split.captions, ""], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        latents = encode(vae, split.pictures)
        data[name] = TeacherData(
            tokens, (latents - vae.config.shift_factor) * vae.config.scaling_factor
        )
    return data


def finish_teachers(
    world: WorldFolder, data: dict[str, TeacherData], steps: dict[str, int], seed: int
) -> None:
    """Train the teachers that are not trained yet: Lune with CLIP, then Sol."""
    clip = CLIPTextModel.from_pretrained(world.path / "clip", dtype=torch.float32)
    for stage in ("lune", "sol"):
        if stage in world.record:
            continue
        unet = UNet2DConditionModel.from_pretrained(world.path / stage, torch_dtype=torch.float32)
        figures = train_teacher(
            stage,
            unet,
            clip,
            data,
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
    splits = {name: read_split(name) for name in SPLITS}
    world = WorldFolder.open(arguments.out, splits[TRAIN].captions, arguments.seed)
    vae = finished_vae(world, splits, arguments.vae_steps, arguments.seed)
    data = teacher_data(world, vae, splits)
    steps = {"lune": arguments.lune_steps, "sol": arguments.sol_steps}
    finish_teachers(world, data, steps, arguments.seed)


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
