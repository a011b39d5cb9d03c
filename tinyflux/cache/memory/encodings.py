"""Pictures as latents, and their captions as embeddings."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.extract import Extractor
from tinyflux.cache.manifest import Recipe
from tinyflux.cache.memory.columns import check_lengths, load_columns, save_columns
from tinyflux.cache.shards import require_finite
from tinyflux.cache.store import open_store
from tinyflux.errors import InputError
from tinyflux.model.text import NullText
from tinyflux.model.zoo import ModelZoo


class EncodingCache:
    """VAE latents ``[N, C, H, W]``, T5 embeddings ``[N, L, D]``, pooled CLIP ``[N, P]``."""

    def __init__(
        self,
        latents: Tensor,
        t5_embeds: Tensor,
        clip_pooled: Tensor,
        dtype: torch.dtype = torch.float16,
        *,
        recipe: Recipe | None = None,
        null_text: NullText | None = None,
    ):
        check_lengths(latents=latents, t5_embeds=t5_embeds, clip_pooled=clip_pooled)
        self.latents = latents.to(dtype)
        self.t5_embeds, self.clip_pooled = t5_embeds.to(dtype), clip_pooled.to(dtype)
        self.recipe, self.null_text = recipe or Recipe(), null_text

    @classmethod
    def build(
        cls,
        zoo: ModelZoo,
        images: list[Image.Image],
        prompts: list[str],
        batch_size: int = 32,
    ) -> "EncodingCache":
        """Encode pictures and their captions."""
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} pictures do not fit {len(prompts)} prompts")
        extractor = Extractor(zoo, lune=False, sol=False, batch_size=batch_size)
        latents, (t5, pooled) = extractor.latents(images), extractor.text(prompts)
        require_finite({"latents": latents, "t5_embeds": t5, "clip_pooled": pooled})
        recipe, null_text = extractor.recipe(), extractor.null_text()
        return cls(latents, t5, pooled, recipe=recipe, null_text=null_text)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """One sample: the three tensors without their first axis, and its ``index``."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"row {idx} of {len(self)}")
        return {
            "latents": self.latents[idx],
            "t5_embeds": self.t5_embeds[idx],
            "clip_pooled": self.clip_pooled[idx],
            "index": idx % len(self),
        }

    def columns(self) -> dict[str, Tensor]:
        """By the names of the format on disk."""
        return {
            "latents": self.latents,
            "t5_embeds": self.t5_embeds,
            "clip_pooled": self.clip_pooled,
        }

    def save(self, path: str) -> None:
        """Write a dataset directory."""
        save_columns(path, self.columns(), self.recipe, self.null_text, open_store(path).name)

    @classmethod
    def load(cls, path: str) -> "EncodingCache":
        """Read a dataset directory."""
        columns, dataset = load_columns(path, ("latents", "t5_embeds", "clip_pooled"))
        return cls(
            **columns,
            dtype=columns["latents"].dtype,
            recipe=dataset.manifest.recipe,
            null_text=dataset.null_text,
        )
