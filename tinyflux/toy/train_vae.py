"""The toy world's VAE, trained (L1 + L2 reconstruction, a light KL term)."""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tinyflux.toy.fit import Figures, fit
from tinyflux.toy.icons import TRAIN
from tinyflux.util.seeding import generator


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Signal-to-noise ratio in dB of ``pictures`` ``[N, 3, H, W]`` in [-1, 1] through ``vae``."""
    errors = [
        F.mse_loss(vae(batch).sample.clamp(-1, 1) / 2, batch / 2, reduction="sum").item()
        for batch in pictures.split(64)
    ]
    return -10 * math.log10(sum(errors) / pictures.numel())


def train_vae(vae: AutoencoderKL, pictures: dict[str, Tensor], steps: int, seed: int) -> Figures:
    """Fit ``vae`` and set its shift and scaling so that latents have mean 0 and deviation 1.

    Args:
        pictures: ``[N, 3, H, W]`` in [-1, 1] of each split; it learns from those of ``train``.
    """
    vae.train().to(memory_format=torch.channels_last)
    random = generator(seed, "vae")
    train = pictures[TRAIN]

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(len(train), (16,), generator=random)
        batch = train[chosen].to(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample(random)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = F.l1_loss(output, batch) + F.mse_loss(output, batch) + 1e-3 * kl
        return loss

    seconds = fit(
        "VAE",
        list(vae.parameters()),
        loss_of_step,
        steps,
        lr=1.2e-3,
        figure=lambda: f"PSNR {psnr(vae, train[::32]):.2f} dB",
    )
    # What is stored is what the teachers are trained on.
    vae.eval().half().float().to(memory_format=torch.contiguous_format)
    latents = encode(vae, train)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    quality = {name: round(psnr(vae, split), 2) for name, split in pictures.items()}
    return {"steps": steps, "seconds": round(seconds), "psnr_db": quality}


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Unscaled posterior modes ``[N, C, h, w]``."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(64)])
