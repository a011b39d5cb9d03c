"""Train the judge of things and styles that ships: ``python -m tinyflux.toy.train_classifier OUT``.

The classifier (:mod:`tinyflux.evaluation.classifier`) judges what a student draws, so it may know
pictures that the student must not: it learns from all splits of the toy pictures
(:mod:`tinyflux.toy.icons`), but for a tenth of the pictures that a digest of thing and style
chooses. These are what its accuracy is told of: it knows their things in other styles alone.

What is judged has been through a VAE's decoder, so half of what it sees has been, too. Half of each
batch is turned, scaled and recoloured, and teaches things alone: a style is known by its colours.
"""

import argparse
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tinyflux.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.labels import label_accuracy
from tinyflux.toy.icons import STYLES, Icon, in_demo, shipped_icons
from tinyflux.toy.world import SHIPPED as WORLD
from tinyflux.util.images import read_picture
from tinyflux.util.logging import log_to_console
from tinyflux.util.seeding import generator

# What the held-out pictures are drawn by; another salt would make the accuracy another one's.
_SALT = "tinyflux classifier 1"
_HELD_OUT = 0.1
BATCH = 64
# A mirrored picture of these shows another thing.
_SIDED = ("left", "right", "clock", "thirty", "arrow", "east", "west", "return", "quarter")

# By its whole name, which running it as a command would hide.
logger = logging.getLogger("tinyflux.toy.train_classifier")


def is_held_out(icon: Icon) -> bool:
    """Whether the classifier is judged by the picture, and never trained on it."""
    digest = hashlib.sha256(f"{_SALT}\0{icon.thing}\0{icon.style}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < _HELD_OUT


@dataclass
class Labelled:
    """Pictures and what they show.

    Attributes:
        icons: N of them.
        versions: ``[V, N, 3, H, W]`` in [-1, 1]: as drawn, and through the VAE.
    """

    icons: list[Icon]
    versions: Tensor

    def labels(self, head: str) -> list[str]:
        """N labels: the icons' attribute of the head's name."""
        return [getattr(icon, head) for icon in self.icons]


@torch.no_grad()
def labelled(icons: list[Icon], vae: AutoencoderKL) -> Labelled:
    """The icons as they are and as the VAE gives them back."""
    pictures = 2 * torch.stack([read_picture(icon.png) for icon in icons]) - 1
    decoded = [vae(part).sample.clamp(-1, 1) for part in pictures.split(64)]
    return Labelled(icons, torch.stack([pictures, torch.cat(decoded)]))


def shifted(pictures: Tensor, random: torch.Generator) -> Tensor:
    """Pictures ``[N, 3, H, W]`` moved by at most a pixel each way, on white."""
    side = pictures.shape[-1]
    moves = torch.randint(-1, 2, (len(pictures), 2), generator=random) * 2 / side
    maps = torch.eye(2).expand(len(pictures), 2, 2)
    return _resampled(pictures, maps, moves)


def distorted(pictures: Tensor, may_flip: Tensor, random: torch.Generator) -> Tensor:
    """Pictures ``[N, 3, H, W]`` turned, scaled, moved, recoloured and, where they may, mirrored."""
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    angles = uniform(-0.25, 0.25)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1)
    mirrored = may_flip & (uniform(0, 1) < 0.5)
    sides = torch.stack([1 - 2 * mirrored.float(), torch.ones(count)], 1)
    maps = turns.view(count, 2, 2) * (uniform(0.85, 1.2, 2) * sides)[:, None]
    moved = _resampled(pictures, maps, uniform(-0.15, 0.15, 2))
    # White stays white: colours are mixed and scaled by their distance from it.
    grey = uniform(0, 1, 1, 1)
    mixes = (1 - grey) * torch.eye(3) + grey / 3
    mixes = mixes * uniform(0.7, 1.3, 3, 1)
    return (1 + torch.einsum("nij,njhw->nihw", mixes, moved - 1)).clamp(-1, 1)


def _resampled(pictures: Tensor, maps: Tensor, moves: Tensor) -> Tensor:
    grid = F.affine_grid(
        torch.cat([maps, moves[..., None]], 2), list(pictures.shape), align_corners=False
    )
    # What comes in from outside is zero, which is to be white.
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)


def batches(count: int, random: torch.Generator) -> Iterator[Tensor]:
    """Rows ``[BATCH]``, every row once before any comes again."""
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < BATCH:
            rows = torch.cat([rows, torch.randperm(count, generator=random)])
        yield rows[:BATCH]
        rows = rows[BATCH:]


def fit(
    model: Classifier, data: Labelled, judged: Labelled, steps: int, seed: int, lr: float = 3e-3
) -> None:
    """Train ``model`` on :data:`BATCH` pictures a step; logs what it reaches on ``judged``."""
    random = generator(seed, "classifier")
    targets = {
        head: torch.tensor([names.index(label) for label in data.labels(head)])
        for head, names in model.config.labels.items()
    }
    may_flip = torch.tensor([not any(word in icon.thing for word in _SIDED) for icon in data.icons])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    rows_of = batches(len(data.icons), random)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = next(rows_of)
        version = torch.randint(len(data.versions), (BATCH,), generator=random)
        pictures = data.versions[version, rows]
        careful, free = pictures.chunk(2)
        seen = torch.cat([shifted(careful, random),
                          distorted(free, may_flip[rows[len(careful):]], random)])  # fmt: skip
        logits = model(seen.to(memory_format=torch.channels_last))
        thing = F.cross_entropy(logits["thing"], targets["thing"][rows], label_smoothing=0.1)
        styled = targets["style"][rows[: len(careful)]]
        style = F.cross_entropy(logits["style"][: len(careful)], styled, label_smoothing=0.05)
        loss = thing + style
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            told = "  ".join(
                f"{name} {one.value:.3f}" for name, one in judge(model, judged).items()
            )
            seconds = time.monotonic() - started
            logger.info("%d/%d, %.0f s, loss %.3f, %s", step + 1, steps, seconds, loss.item(), told)
            model.train()


@torch.inference_mode()
def judge(model: Classifier, data: Labelled) -> dict[str, Estimate]:
    """Accuracy by head; of things among the demo's, too; and all of it through the VAE."""
    model.eval()
    demo = [index for index, icon in enumerate(data.icons) if in_demo(icon)]
    vocabulary = {icon.thing for icon in shipped_icons() if in_demo(icon)}
    made = {}
    for behind, pictures in zip(("", " through the VAE"), data.versions, strict=True):
        parts = [model(part) for part in pictures.split(256)]
        for head, names in model.config.labels.items():
            logits, wanted = torch.cat([part[head] for part in parts]), data.labels(head)
            made[f"{head}{behind}"] = label_accuracy(logits, names, wanted)
            if head == "thing":
                made[f"{head} among the demo's{behind}"] = label_accuracy(
                    logits[demo], names, [wanted[row] for row in demo], vocabulary
                )
    return made


def main() -> None:
    """Train a classifier into the folder that the command line names."""
    arguments = _arguments()
    log_to_console()
    vae = AutoencoderKL.from_pretrained(arguments.vae, torch_dtype=torch.float32).eval()
    icons = list(shipped_icons())
    data = labelled([icon for icon in icons if not is_held_out(icon)], vae)
    judged = labelled([icon for icon in icons if is_held_out(icon)], vae)
    labels = {
        "thing": sorted({icon.thing for icon in icons}),
        "style": [style.name for style in STYLES],
    }
    torch.manual_seed(arguments.seed)
    model = Classifier(ClassifierConfig(labels))
    fit(model, data, judged, arguments.steps, arguments.seed)
    model.half().float()  # what is stored is what is judged
    model.config.accuracy = judge(model, judged)
    model.config.description = (
        f"Trained by tinyflux.toy.train_classifier for {arguments.steps} steps on "
        f"{len(data.icons):,} toy pictures of all splits, the pairs' and things' too, half of the "
        f"time through the VAE {_digest(arguments.vae)}; accuracy on {len(judged.icons)} others, "
        "which a digest of thing and style chose: it knows their things in other styles alone."
    )
    save_classifier(model, arguments.out)


def _digest(folder: Path) -> str:
    """The first digits of the SHA-256 of a model's weights, which tell it from others."""
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()[:12]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of the classifier")
    parser.add_argument("--vae", type=Path, default=WORLD / "vae", help="a VAE's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
