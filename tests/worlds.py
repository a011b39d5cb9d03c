"""An untrained world of the smallest sizes, with a VAE of the teachers' own."""

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.toy.world import WorldSizes, build_untrained

CAPTIONS = ["red circle", "blue square", "green heart", "a yellow star on black"]
SIZES = WorldSizes(
    picture_size=16,
    vae_channels=(8, 16, 16),
    latent_channels=4,
    sd_latent_channels=2,
    text_width=16,
    text_layers=2,
    teacher_channels=(8, 16),
    vocabulary=60,
)


def make_world(folder: Path, seed: int = 0) -> Path:
    """Write the world of ``seed`` to ``folder``; one process makes it once and copies it."""
    return Path(shutil.copytree(Path(_made(seed).name) / "world", folder, dirs_exist_ok=True))


@functools.cache
def _made(seed: int) -> "tempfile.TemporaryDirectory[str]":
    """A directory that holds the world and goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="tinyflux-world-", ignore_cleanup_errors=True)
    build_untrained(Path(folder.name) / "world", CAPTIONS, seed, SIZES)
    return folder


def zoo_config(folder: Path) -> ZooConfig:
    return ZooConfig(
        vae_repo=str(folder),
        t5_repo=str(folder / "t5"),
        clip_repo=str(folder / "clip"),
        experts_repo=str(folder),
        sd_repo=str(folder / "sd"),
        device="cpu",
        dtype=torch.float32,
    )


def student_config(**changes) -> TinyFluxConfig:
    """A student that fits the world."""
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_double_layers": 1,
        "num_single_layers": 1,
        "lune_expert_dim": 16,
        "lune_hidden_dim": 16,
        "sol_hidden_dim": 16,
        "t5_layers": (0, 1, 2),
        "t5_hidden_size": 16,
        "axes_dims_rope": (4, 6, 6),
        "in_channels": 4,
        "pooled_projection_dim": 16,
        "max_text_length": 24,
        "latent_shift": 0.0,
        "timestep_shift": 1.0,
    }
    return TinyFluxConfig(**{**sizes, **changes})


def write_pictures(folder: Path, captions=CAPTIONS, size=(16, 16), seed=3) -> Path:
    """A folder of noise pictures, each with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index, caption in enumerate(captions):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(caption)
    return folder
