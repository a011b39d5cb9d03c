"""Pictures and captions to the columns of a dataset, in one process and without Ray."""

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.config import CacheConfig
from tinyflux.cache.keys import Size
from tinyflux.cache.manifest import GroupInfo, ModelInfo, Recipe
from tinyflux.errors import CacheError
from tinyflux.model.teachers import SPATIAL_SIZE, lune_features, sol_features
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.buckets import default_buckets
from tinyflux.util.config import dtype_name, to_dict
from tinyflux.util.predictions import flow_x_t
from tinyflux.util.seeding import randn_for

logger = logging.getLogger(__name__)

# Raise a number when the code of its group changes what it computes.
CODE_VERSIONS = {"latents": 1, "mask": 1, "text": 1, "lune": 1, "sol": 1}

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A captioned picture ready for the encoders.

    Attributes:
        key: what this sample's randomness comes from; see :mod:`tinyflux.cache.keys`.
        image: RGB, at the size of its batch; None where only the caption is encoded.
        mask: its foreground (mode L), of the same size; None means all of it.
    """

    key: str
    caption: str
    image: Image.Image | None = None
    mask: Image.Image | None = None


class Extractor:
    """Runs the frozen models over samples.

    A sample's features depend on its picture, its caption and the seed, up to kernel rounding:
    not on its batch, nor on who computes it. All are given in fp16, and may overflow there: see
    :func:`tinyflux.cache.shards.finite_rows`.
    """

    def __init__(
        self,
        zoo: ModelZoo,
        lune: bool = True,
        sol: bool = True,
        seed: int = 0,
        batch_size: int = 32,
        t_buckets: Tensor | None = None,
        spatial_size: int = SPATIAL_SIZE,
        batch_timesteps: bool = False,
    ):
        self.zoo, self.lune, self.sol, self.seed = zoo, lune, sol, seed
        self.batch_size, self.spatial_size = batch_size, spatial_size
        self.batch_timesteps = batch_timesteps
        self.t_buckets = default_buckets() if t_buckets is None else t_buckets

    def columns(self, groups: Collection[str], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The columns of ``groups`` (``schema.GROUPS``) for samples of one size."""
        found: dict[str, Tensor] = {}
        captions = [sample.caption for sample in samples]
        images = [sample.image for sample in samples if sample.image is not None]
        if "latents" in groups:
            found["latents"] = self.latents(images)
        if "mask" in groups:
            found["mask"] = self.masks([sample.mask for sample in samples], images[0].size)
        if "text" in groups:
            found["t5_embeds"], found["clip_pooled"] = self.text(captions, warn_cut=False)
        if teachers := [name for name in ("lune", "sol") if name in groups]:
            keys = [sample.key for sample in samples]
            latents = self.teacher_latents(images)
            found.update(self.teachers(keys, latents, captions, teachers))
        return found

    def latents(self, images: list[Image.Image]) -> Tensor:
        """``[N, C, h, w]``."""
        return self._bounded(lambda size: self.zoo.encode_images_batched(images, size)).half().cpu()

    def text(
        self, captions: list[str], allow_empty: bool = False, warn_cut: bool = True
    ) -> tuple[Tensor, Tensor]:
        """T5 embeddings ``[N, L, D]`` and pooled CLIP embeddings ``[N, P]``.

        Args:
            allow_empty, warn_cut: as in :meth:`ModelZoo.encode_prompts_batched`.
        """
        t5, pooled = self._bounded(
            lambda size: self.zoo.encode_prompts_batched(captions, size, allow_empty, warn_cut)
        )
        return t5.half().cpu(), pooled.half().cpu()

    def masks(self, masks: Sequence[Image.Image | None], size: Size) -> Tensor:
        """Share of foreground in each latent's place, ``[N, h, w]``; all of it without a mask."""
        step = self.zoo.downscale
        grid = (size[0] // step, size[1] // step)
        whole = Image.new("L", grid, 255)
        small = [whole if m is None else m.resize(grid, Image.Resampling.BOX) for m in masks]
        return torch.stack([torch.from_numpy(np.array(m)) for m in small]).half() / 255

    def teacher_latents(self, images: list[Image.Image]) -> Tensor:
        """``[N, C, h, w]`` of the teachers' VAE."""
        return self._bounded(lambda size: self.zoo.encode_teacher_latents_batched(images, size))

    def teachers(
        self,
        keys: Sequence[str],
        latents: Tensor | None,
        captions: list[str],
        names: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Teacher features by bucket, by column.

        They are ``lune`` ``[N, K, D]``, ``sol_stats`` ``[N, K, 4]`` and ``sol_spatial``
        ``[N, K, s, s]``.

        Args:
            keys: what each sample's noise is drawn from.
            latents: ``[N, C, h, w]``; None stands for pure noise, when there are prompts alone.
            names: of the teachers to run; by default all of this extractor's.
        """
        chosen = {"lune": self.lune, "sol": self.sol}
        names = [name for name in chosen if chosen[name]] if names is None else names
        text = self._bounded(lambda size: self.zoo.encode_clip_tokens(captions, size))
        return self._bounded(lambda size: self._in_batches(keys, latents, text, names, size))

    def _in_batches(
        self,
        keys: Sequence[str],
        latents: Tensor | None,
        text: Tensor,
        names: Collection[str],
        size: int,
    ) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        buckets = list(range(len(self.t_buckets)))
        together = [buckets] if self.batch_timesteps else [[bucket] for bucket in buckets]
        for start in range(0, len(keys), size):
            rows = slice(start, min(start + size, len(keys)))
            data = None if latents is None else latents[rows]
            parts = [self._buckets(keys[rows], data, text[rows], names, b) for b in together]
            for name in parts[0]:
                found.setdefault(name, []).append(torch.cat([p[name] for p in parts], dim=1))
        return {name: torch.cat(rows).half().cpu() for name, rows in found.items()}

    def _buckets(
        self,
        keys: Sequence[str],
        latents: Tensor | None,
        text: Tensor,
        names: Collection[str],
        buckets: list[int],
    ) -> dict[str, Tensor]:
        """Features ``[B, len(buckets), ...]`` of one batch, in one call of each teacher."""
        repeats, batch = len(buckets), len(keys)
        if latents is None:
            unet = (self.zoo.load_lune if "lune" in names else self.zoo.load_sol)()
            side = unet.config.sample_size
            data = torch.zeros(batch, unet.config.in_channels, side, side, device=text.device)
        else:
            data = latents.float()
        noise = torch.stack(
            [randn_for(data.shape[1:], self.seed, "teacher", k, b) for b in buckets for k in keys]
        ).to(data.device)
        t = self.t_buckets[buckets].repeat_interleave(batch).to(data.device)
        # Prompts alone: pure noise, though the teacher is told the bucket's time.
        noised = noise if latents is None else flow_x_t(data.repeat(repeats, 1, 1, 1), noise, t)
        context = text.repeat(repeats, 1, 1)
        features = {}
        if "lune" in names:
            features["lune"] = lune_features(self.zoo.load_lune(), noised, 1 - t, context)
        if "sol" in names:
            sol = sol_features(self.zoo.load_sol(), noised, 1 - t, context, self.spatial_size)
            features["sol_stats"], features["sol_spatial"] = sol
        return {
            name: value.unflatten(0, (repeats, batch)).transpose(0, 1)
            for name, value in features.items()
        }

    def _bounded(self, work: Callable[[int], T]) -> T:
        """``work(batch_size)``, with batches halved, from then on, until they fit the memory."""
        while True:
            try:
                return work(self.batch_size)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise CacheError(
                        f"the memory does not hold a single picture's features ({error!s:.100}): "
                        f"use smaller pictures or a larger machine"
                    ) from error
            self.batch_size = math.ceil(self.batch_size / 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.info("cache: out of memory, going on with batches of %d", self.batch_size)

    def null_text(self) -> tuple[Tensor, Tensor]:
        """The empty caption's embeddings ``[L, D]`` and ``[P]``."""
        t5, pooled = self.text([""], allow_empty=True)
        return t5[0], pooled[0]

    def recipe(self, mask: bool = False) -> Recipe:
        """What the numbers mean and which weights made them.

        Args:
            mask: there are foreground masks as well.
        """
        zoo = self.zoo
        recipe = Recipe(
            seed=self.seed,
            t_buckets=tuple(round(t, 6) for t in self.t_buckets.tolist()),
            t5_layers=zoo.t5_layers,
            max_text_length=zoo.max_text_length,
            text_padding=zoo.text_padding,
            latent_shift=zoo.latent_shift,
            latent_scale=zoo.vae_scale,
        )
        text = {name: getattr(recipe, name) for name in ("t5_layers", "max_text_length")}
        teacher = {"seed": recipe.seed, "t_buckets": recipe.t_buckets}
        # What a group is computed by and with; change any of it, and that group is another.
        made: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
            "latents": (("vae",), {"shift": recipe.latent_shift, "scale": recipe.latent_scale}),
            "text": (("t5", "clip"), {**text, "text_padding": recipe.text_padding}),
        }
        if mask:
            made["mask"] = ((), {"downscale": zoo.downscale})
        if self.lune:
            made["lune"] = (("lune", "sd_vae", "clip"), teacher)
        if self.sol:
            spatial = {"spatial_size": self.spatial_size}
            made["sol"] = (("sol", "sd_vae", "clip"), {**teacher, **spatial})
        repos = {
            "vae": zoo.vae_repo,
            "t5": zoo.t5_repo,
            "clip": zoo.clip_repo,
            "lune": zoo.experts_repo,
            "sol": zoo.experts_repo,
            "sd_vae": zoo.sd_repo,
        }
        groups = {
            group: GroupInfo(
                models={name: ModelInfo(repos[name], zoo.digest(name)) for name in models},
                dtype=dtype_name(zoo.dtype),
                code_version=CODE_VERSIONS[group],
                settings=to_dict(settings),
            )
            for group, (models, settings) in made.items()
        }
        return dataclasses.replace(recipe, groups=groups)


def _out_of_memory(error: RuntimeError) -> bool:
    """Torch has a class for it on accelerators only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def extractor_for(zoo: ModelZoo, config: CacheConfig) -> Extractor:
    """The extractor that a build job's actors run."""
    return Extractor(
        zoo,
        lune=config.extract_lune,
        sol=config.extract_sol,
        seed=config.seed,
        batch_size=config.batch_size,
    )
