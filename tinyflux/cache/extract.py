"""Pictures and captions to the columns of a dataset, in one process and without Ray."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.manifest import GroupInfo, ModelInfo, Recipe
from tinyflux.cache.schema import MAX_ROWS_PER_SHARD, Column
from tinyflux.cache.shards import to_storage
from tinyflux.cache.sources import Sample
from tinyflux.errors import ConfigError
from tinyflux.model.teachers import lune_features, sol_features
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.buckets import default_buckets
from tinyflux.util.config import dtype_name
from tinyflux.util.predictions import flow_x_t
from tinyflux.util.seeding import randn_for

# Raise a number when the code of its group changes what it computes.
CODE_VERSIONS = {"latents": 1, "text": 1, "lune": 1, "sol": 1}


@dataclass
class CacheConfig:
    """How a dataset is built.

    Attributes:
        path: directory of the dataset.
        extract_lune, extract_sol: run that teacher.
        num_actors: Ray actors, each with all models; ``cpus_per_actor`` and ``gpus_per_actor``
            are what Ray reserves for one.
        batch_size: pictures per forward.
        rows_per_shard: samples that are committed together.
        seed: of the noise that teachers see.
    """

    path: str = ""
    extract_lune: bool = True
    extract_sol: bool = True
    num_actors: int = 1
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    batch_size: int = 32
    rows_per_shard: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_actors", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cache.{name} must be at least 1, not {getattr(self, name)}")
        if self.rows_per_shard > MAX_ROWS_PER_SHARD:
            raise ConfigError(
                f"cache.rows_per_shard must be at most {MAX_ROWS_PER_SHARD}, not "
                f"{self.rows_per_shard}"
            )
        if self.cpus_per_actor < 0 or self.gpus_per_actor < 0:
            raise ConfigError("cache.cpus_per_actor and cache.gpus_per_actor must not be negative")


class Extractor:
    """Runs the frozen models over samples.

    A sample's features depend on its picture, its caption and the seed, up to kernel rounding:
    not on its batch, nor on who computes it.
    """

    def __init__(
        self,
        zoo: ModelZoo,
        lune: bool = True,
        sol: bool = True,
        seed: int = 0,
        batch_size: int = 32,
        t_buckets: Tensor | None = None,
        spatial_size: int = 8,
        batch_timesteps: bool = False,
    ):
        self.zoo, self.lune, self.sol, self.seed = zoo, lune, sol, seed
        self.batch_size, self.spatial_size = batch_size, spatial_size
        self.batch_timesteps = batch_timesteps
        self.t_buckets = default_buckets() if t_buckets is None else t_buckets

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Column]:
        """Every column of ``samples`` but their keys, tensors in fp16."""
        images = [sample.image for sample in samples]
        captions = [sample.caption for sample in samples]
        columns: dict[str, Column] = {
            "caption": captions,
            "source": [sample.source for sample in samples],
            "width": [sample.width for sample in samples],
            "height": [sample.height for sample in samples],
            "latents": self.latents(images),
        }
        columns["t5_embeds"], columns["clip_pooled"] = self.text(captions)
        if self.lune or self.sol:
            latents = self.teacher_latents(images)
            keys = [sample.key for sample in samples]
            columns.update(self.teachers(keys, latents, captions))
        return columns

    def join(self, batches: Iterable[Sequence[Sample]]) -> tuple[list[str], dict[str, Column]]:
        """Keys and columns of all samples; only one batch's pictures are needed at a time."""
        keys: list[str] = []
        parts: list[dict[str, Column]] = []
        for samples in batches:
            keys += [sample.key for sample in samples]
            parts.append(self(samples))
        return keys, {name: _concatenate([part[name] for part in parts]) for name in parts[0]}

    def latents(self, images: list[Image.Image]) -> Tensor:
        """``[N, C, h, w]`` fp16."""
        return to_storage(self.zoo.encode_images_batched(images, self.batch_size), "latents")

    def text(self, captions: list[str], allow_empty: bool = False) -> tuple[Tensor, Tensor]:
        """T5 embeddings ``[N, L, D]`` and pooled CLIP embeddings ``[N, P]``, fp16."""
        t5, pooled = self.zoo.encode_prompts_batched(
            captions, self.batch_size, allow_empty=allow_empty
        )
        return to_storage(t5, "the text embedding"), to_storage(pooled, "the pooled embedding")

    def teacher_latents(self, images: list[Image.Image]) -> Tensor:
        """``[N, C, h, w]`` of the teachers' VAE."""
        return self.zoo.encode_teacher_latents_batched(images, self.batch_size)

    def teachers(
        self, keys: Sequence[str], latents: Tensor | None, captions: list[str]
    ) -> dict[str, Tensor]:
        """Teacher features by bucket, fp16: ``lune`` ``[N, K, D]``, ``sol_stats`` ``[N, K, 4]``
        and ``sol_spatial`` ``[N, K, s, s]``.

        Args:
            keys: what each sample's noise is drawn from.
            latents: ``[N, C, h, w]``; None stands for pure noise, when there are prompts alone.
        """
        text = self.zoo.encode_clip_tokens(captions, self.batch_size)
        found: dict[str, list[Tensor]] = {}
        buckets = list(range(len(self.t_buckets)))
        together = [buckets] if self.batch_timesteps else [[bucket] for bucket in buckets]
        for start in range(0, len(keys), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(keys)))
            parts = [self._buckets(keys[rows], latents, rows, text[rows], b) for b in together]
            for name in parts[0]:
                found.setdefault(name, []).append(torch.cat([p[name] for p in parts], dim=1))
        return {name: to_storage(torch.cat(rows), name) for name, rows in found.items()}

    def _buckets(
        self,
        keys: Sequence[str],
        latents: Tensor | None,
        rows: slice,
        text: Tensor,
        buckets: list[int],
    ) -> dict[str, Tensor]:
        """Features ``[B, len(buckets), ...]`` of one batch, in one call of each teacher."""
        repeats, batch = len(buckets), len(keys)
        if latents is None:
            unet = (self.zoo.load_lune if self.lune else self.zoo.load_sol)()
            side = unet.config.sample_size
            data = torch.zeros(batch, unet.config.in_channels, side, side, device=text.device)
        else:
            data = latents[rows].float()
        noise = torch.stack(
            [randn_for(data.shape[1:], self.seed, "teacher", k, b) for b in buckets for k in keys]
        ).to(data.device)
        t = self.t_buckets[buckets].repeat_interleave(batch).to(data.device)
        # Prompts alone: pure noise, though the teacher is told the bucket's time.
        noised = noise if latents is None else flow_x_t(data.repeat(repeats, 1, 1, 1), noise, t)
        context = text.repeat(repeats, 1, 1)
        features = {}
        if self.lune:
            features["lune"] = lune_features(self.zoo.load_lune(), noised, 1 - t, context)
        if self.sol:
            sol = sol_features(self.zoo.load_sol(), noised, 1 - t, context, self.spatial_size)
            features["sol_stats"], features["sol_spatial"] = sol
        return {
            name: value.unflatten(0, (repeats, batch)).transpose(0, 1)
            for name, value in features.items()
        }

    def recipe(self) -> Recipe:
        """What the numbers mean and which weights made them."""
        zoo = self.zoo
        used = {"latents": ("vae",), "text": ("t5", "clip")}
        if self.lune:
            used["lune"] = ("lune", "sd_vae", "clip")
        if self.sol:
            used["sol"] = ("sol", "sd_vae", "clip")
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
                models={name: ModelInfo(repos[name], zoo.digest(name)) for name in names},
                dtype=dtype_name(zoo.dtype),
                code_version=CODE_VERSIONS[group],
            )
            for group, names in used.items()
        }
        return Recipe(
            seed=self.seed,
            t_buckets=tuple(round(t, 6) for t in self.t_buckets.tolist()),
            t5_layers=zoo.t5_layers,
            max_text_length=zoo.max_text_length,
            text_padding=zoo.text_padding,
            latent_shift=zoo.latent_shift,
            latent_scale=zoo.vae_scale,
            groups=groups,
        )


def _concatenate(parts: Sequence[Any]) -> Column:
    """Tensors or lists, one after another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return [value for part in parts for value in part]


def extractor_for(zoo: ModelZoo, config: CacheConfig) -> Extractor:
    """The extractor that a build job's actors run."""
    return Extractor(
        zoo,
        lune=config.extract_lune,
        sol=config.extract_sol,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def settings_of(*configs: object) -> dict[str, object]:
    """Those settings of a build that decide what comes out, by dotted name."""
    irrelevant = {"path", "num_actors", "cpus_per_actor", "gpus_per_actor", "device"}
    found: dict[str, object] = {}
    for config in configs:
        section = type(config).__name__.removesuffix("Config").lower()
        for field in dataclasses.fields(config):  # type: ignore[arg-type]
            if field.name not in irrelevant:
                found[f"{section}.{field.name}"] = getattr(config, field.name)
    return found
