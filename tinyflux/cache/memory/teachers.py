"""Lune's and Sol's features of samples, at some times each."""

import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.extract import Extractor
from tinyflux.cache.keys import digest_of, sample_key
from tinyflux.cache.manifest import Recipe
from tinyflux.cache.memory.columns import check_lengths, load_columns, save_columns
from tinyflux.cache.shards import require_finite
from tinyflux.cache.store import open_store
from tinyflux.errors import InputError
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.buckets import default_buckets, interpolate_buckets

T_BUCKETS = default_buckets()


class _TeacherCache:
    """What both teachers' caches share: features ``[N, K, ...]`` at K student times."""

    NAMES: tuple[str, ...]

    def __init__(self, columns: dict[str, Tensor], t_buckets: Tensor, recipe: Recipe | None):
        check_lengths(**columns)
        for name, rows in columns.items():
            if rows.shape[1] != len(t_buckets):
                raise InputError(f"{name} has {rows.shape[1]} buckets, t_buckets {len(t_buckets)}")
        self.t_buckets = t_buckets.float()
        times = tuple(round(t, 6) for t in self.t_buckets.tolist())
        self.recipe = recipe or Recipe(t_buckets=times)
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def columns(self) -> dict[str, Tensor]:
        """By the names of the format on disk."""
        return dict(self._columns)

    def _at(self, indices: Tensor, timesteps: Tensor) -> list[Tensor]:
        t = timesteps.cpu()
        rows = [self._columns[name][indices.cpu()].float() for name in self.NAMES]
        return [interpolate_buckets(r, self.t_buckets, t).to(timesteps.device) for r in rows]

    def save(self, path: str) -> None:
        """Write a dataset directory."""
        save_columns(path, self._columns, self.recipe, None, open_store(path).name)


class LuneFeatureCache(_TeacherCache):
    """Lune's features ``[N, K, D]`` at times ``t_buckets`` ``[K]``."""

    NAMES = ("lune",)

    def __init__(
        self,
        features: Tensor,
        t_buckets: Tensor,
        dtype: torch.dtype = torch.float16,
        *,
        recipe: Recipe | None = None,
    ):
        super().__init__({"lune": features.to(dtype)}, t_buckets, recipe)

    @property
    def features(self) -> Tensor:
        """``[N, K, D]``."""
        return self._columns["lune"]

    @classmethod
    def build(
        cls,
        zoo: ModelZoo,
        prompts: list[str],
        t_buckets: Tensor = T_BUCKETS,
        batch_size: int = 64,
        batch_timesteps: bool = False,
        *,
        images: list[Image.Image] | None = None,
    ) -> "LuneFeatureCache":
        """Run Lune. With ``images`` on the noised pictures, with prompts alone on pure noise."""
        extractor = Extractor(
            zoo,
            sol=False,
            batch_size=batch_size,
            t_buckets=t_buckets,
            batch_timesteps=batch_timesteps,
        )
        found = _run_teachers(extractor, prompts, images)
        return cls(found["lune"], extractor.t_buckets, recipe=extractor.recipe())

    def get_features(self, indices: Tensor, timesteps: Tensor) -> Tensor:
        """Features ``[B, D]`` in fp32 of samples ``[B]`` at ``timesteps`` ``[B]``, interpolated."""
        return self._at(indices, timesteps)[0]

    @classmethod
    def load(cls, path: str) -> "LuneFeatureCache":
        """Read a dataset directory."""
        columns, dataset = load_columns(path, cls.NAMES)
        recipe = dataset.manifest.recipe
        return cls(columns["lune"], dataset.t_buckets, columns["lune"].dtype, recipe=recipe)


class SolFeatureCache(_TeacherCache):
    """Sol's statistics ``[N, K, 4]`` and maps ``[N, K, s, s]`` at times ``t_buckets`` ``[K]``."""

    NAMES = ("sol_stats", "sol_spatial")

    def __init__(
        self,
        stats: Tensor,
        spatial: Tensor,
        t_buckets: Tensor,
        dtype: torch.dtype = torch.float16,
        *,
        recipe: Recipe | None = None,
    ):
        columns = {"sol_stats": stats.to(dtype), "sol_spatial": spatial.to(dtype)}
        super().__init__(columns, t_buckets, recipe)

    @property
    def stats(self) -> Tensor:
        """``[N, K, 4]``."""
        return self._columns["sol_stats"]

    @property
    def spatial(self) -> Tensor:
        """``[N, K, s, s]``."""
        return self._columns["sol_spatial"]

    @classmethod
    def build(
        cls,
        zoo: ModelZoo,
        prompts: list[str],
        t_buckets: Tensor = T_BUCKETS,
        spatial_size: int = 8,
        batch_size: int = 64,
        batch_timesteps: bool = True,
        *,
        images: list[Image.Image] | None = None,
    ) -> "SolFeatureCache":
        """Run Sol. With ``images`` on the noised pictures, with prompts alone on pure noise."""
        extractor = Extractor(
            zoo,
            lune=False,
            batch_size=batch_size,
            t_buckets=t_buckets,
            spatial_size=spatial_size,
            batch_timesteps=batch_timesteps,
        )
        found = _run_teachers(extractor, prompts, images)
        return cls(
            found["sol_stats"],
            found["sol_spatial"],
            extractor.t_buckets,
            recipe=extractor.recipe(),
        )

    def get_features(self, indices: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics ``[B, 4]`` and maps ``[B, s, s]`` of samples ``[B]`` at ``timesteps``."""
        stats, spatial = self._at(indices, timesteps)
        return stats, spatial

    @classmethod
    def load(cls, path: str) -> "SolFeatureCache":
        """Read a dataset directory."""
        columns, dataset = load_columns(path, cls.NAMES)
        return cls(
            columns["sol_stats"],
            columns["sol_spatial"],
            dataset.t_buckets,
            columns["sol_stats"].dtype,
            recipe=dataset.manifest.recipe,
        )


def _run_teachers(
    extractor: Extractor, prompts: list[str], images: list[Image.Image] | None
) -> dict[str, Tensor]:
    """Both build methods' common part; a sample's noise comes from its picture and caption."""
    if images is None:
        keys = [digest_of([row, prompt]) for row, prompt in enumerate(prompts)]
        latents = None
    elif len(images) != len(prompts):
        raise InputError(f"{len(images)} pictures do not fit {len(prompts)} prompts")
    else:
        keys = [
            sample_key(digest_of(image.convert("RGB").tobytes()), image.size, prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        latents = extractor.teacher_latents(images)
    features = extractor.teachers(keys, latents, prompts)
    require_finite(features)
    return features
