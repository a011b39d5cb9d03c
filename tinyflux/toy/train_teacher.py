"""A teacher of the toy world, trained by rectified flow on the VAE's latents, and judged."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from tinyflux.toy.fit import Figures, fit
from tinyflux.toy.icons import TRAIN
from tinyflux.util.seeding import generator

# Pictures of each split that the teachers' figures are taken on, and their seed.
JUDGED = 512
JUDGED_SEED = 1000


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

    seconds = fit(
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
