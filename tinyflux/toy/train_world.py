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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from tinyflux.toy.fit import Figures
from tinyflux.toy.icons import SHIPPED, SHIPPED_SIZE, SPLITS, TRAIN, read_icons
from tinyflux.toy.train_teacher import TeacherData, train_teacher
from tinyflux.toy.train_vae import encode, train_vae
from tinyflux.toy.world import WorldSizes, build_untrained
from tinyflux.util.files import atomic_write
from tinyflux.util.images import read_picture
from tinyflux.util.logging import log_to_console

RECORD = "world.json"


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
        pictures = {name: split.pictures for name, split in splits.items()}
        figures = train_vae(vae, pictures, steps, seed)
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
