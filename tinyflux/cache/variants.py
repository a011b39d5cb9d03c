"""Variants of a picture, such as its mirror image: which there are, and how each is made.

A variant has a column group of its own for each that is made of pixels, such as ``latents-flip``
beside ``latents``: row i of both is of one picture. Text is the same for all and is kept once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps

from tinyflux.cache.config import VariantsConfig
from tinyflux.cache.keys import Size, digest_of
from tinyflux.cache.manifest import Recipe
from tinyflux.cache.schema import PIXEL_GROUPS
from tinyflux.cache.sources import fit_mask, fit_picture
from tinyflux.util.seeding import generator

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Variant:
    """The plain picture, its mirror image, or a crop of either.

    Attributes:
        crop: which of its random crops; 0 is the whole picture.
        flip: the mirror image.
    """

    crop: int = 0
    flip: bool = False

    @property
    def name(self) -> str:
        """Such as ``"crop1-flip"``; that of the plain picture is empty."""
        parts = [f"crop{self.crop}"] if self.crop else []
        return "-".join([*parts, "flip"] if self.flip else parts)

    @classmethod
    def named(cls, name: str) -> "Variant":
        """The variant of that name."""
        parts = name.split("-")
        crop = next((int(part[4:]) for part in parts if part.startswith("crop")), 0)
        return cls(crop, "flip" in parts)

    def settings(self, config: VariantsConfig, seed: int) -> dict[str, Any]:
        """What decides its pixels, beside the picture and its size."""
        drawn = {"crop": self.crop, "min_crop": config.min_crop, "seed": seed} if self.crop else {}
        return {**drawn, "flip": self.flip}

    def key(self, key: str) -> str:
        """What a sample's randomness comes from, which for the plain picture is ``key``."""
        return digest_of([key, self.name]) if self.name else key

    def box(
        self, picture: str, whole: Size, size: Size, config: VariantsConfig, seed: int
    ) -> Box | None:
        """Left, top, right and bottom of what is shown at ``size``, in pixels; None: all of it.

        A crop has the shape of ``size``. How large it is and where it lies follow from the seed,
        its number and the picture's digest.

        Args:
            picture: digest of the picture file.
            whole: its width and height.
        """
        if not self.crop:
            return None
        source = generator(seed, "crop", self.crop, picture)
        share, x, y = torch.rand(3, dtype=torch.float64, generator=source).tolist()
        scale = min(whole[0] / size[0], whole[1] / size[1])
        scale *= config.min_crop + (1 - config.min_crop) * share
        width, height = scale * size[0], scale * size[1]
        left, top = x * (whole[0] - width), y * (whole[1] - height)
        return left, top, min(left + width, whole[0]), min(top + height, whole[1])

    def picture(self, image: Image.Image, size: Size, box: Box | None) -> Image.Image:
        """The variant of an upright picture, at ``size``."""
        return self._turned(
            fit_picture(image, size)
            if box is None
            else image.resize(size, Image.Resampling.LANCZOS, box)
        )

    def mask(self, mask: Image.Image, size: Size, box: Box | None) -> Image.Image:
        """The same of its mask."""
        return self._turned(
            fit_mask(mask, size) if box is None else mask.resize(size, Image.Resampling.BOX, box)
        )

    def _turned(self, shown: Image.Image) -> Image.Image:
        return ImageOps.mirror(shown) if self.flip else shown


def variants_of(config: VariantsConfig) -> list[Variant]:
    """The variants beside the plain picture, in the order of their groups."""
    both = (False, True) if config.flips else (False,)
    all_of_them = [Variant(crop, flip) for crop in range(config.crops + 1) for flip in both]
    return all_of_them[1:]


def with_variants(recipe: Recipe, config: VariantsConfig, seed: int) -> Recipe:
    """``recipe`` with the groups of every variant, behind those of the plain picture."""
    groups = dict(recipe.groups)
    for variant in variants_of(config):
        for group in (group for group in PIXEL_GROUPS if group in recipe.groups):
            info = recipe.groups[group]
            settings = {**info.settings, "variant": variant.settings(config, seed)}
            groups[f"{group}-{variant.name}"] = dataclasses.replace(info, settings=settings)
    return dataclasses.replace(recipe, groups=groups)
