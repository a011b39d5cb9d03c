"""The caches of the public API: in memory, saved to and loaded from the format on disk."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.config import MAX_ROWS_PER_SHARD
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import Extractor
from tinyflux.cache.keys import digest_of, sample_key
from tinyflux.cache.manifest import MANIFEST_NAME, Manifest, Recipe, ShardInfo
from tinyflux.cache.shards import require_finite, write_null_text, write_shard
from tinyflux.cache.store import open_store
from tinyflux.errors import CacheError, InputError
from tinyflux.model.zoo import ModelZoo
from tinyflux.util.buckets import default_buckets, interpolate_buckets

Text = tuple[Tensor, Tensor]

T_BUCKETS = default_buckets()


def _save(
    path: str, columns: dict[str, Tensor], recipe: Recipe, null_text: Text | None, name: str
) -> None:
    """Write ``columns`` as a dataset directory, replacing what is there only when whole."""
    store = open_store(path)
    if store.size(MANIFEST_NAME) is not None:
        raise CacheError(f"there is a cache at '{path}' already: use another path or delete it")
    count = len(next(iter(columns.values())))
    shards: list[ShardInfo] = []
    for start in range(0, count, MAX_ROWS_PER_SHARD):
        part = {n: rows[start : start + MAX_ROWS_PER_SHARD] for n, rows in columns.items()}
        keys = [f"{row:08d}" for row in range(start, min(count, start + MAX_ROWS_PER_SHARD))]
        require_finite(part)
        shards.append(write_shard(store, f"{len(shards):05d}", keys, part, trim_text=True))
    written = None
    if null_text is not None:
        written = write_null_text(store, null_text[0], null_text[1])
    Manifest(count, recipe, tuple(shards), written, name=name).save(store)


def _load(path: str, columns: Sequence[str]) -> tuple[dict[str, Tensor], CachedDataset]:
    """The named columns of all rows, in their stored dtype."""
    dataset = CachedDataset(path)
    for name in columns:
        if dataset.manifest.layout(name) is None:
            raise CacheError(f"the cache '{path}' holds no {name}")
    rows = dataset.read(range(len(dataset)))
    layouts = {name: dataset.manifest.layout(name) for name in columns}
    dtypes = {name: getattr(torch, layout.dtype) for name, layout in layouts.items() if layout}
    return {name: rows[name].to(dtypes[name]) for name in columns}, dataset


def _same_length(**columns: Tensor) -> None:
    lengths = {name: len(rows) for name, rows in columns.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputError(
            f"a cache's tensors must have one length above 0, not {lengths}: one row per sample"
        )


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
        null_text: Text | None = None,
    ):
        _same_length(latents=latents, t5_embeds=t5_embeds, clip_pooled=clip_pooled)
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
        _save(path, self.columns(), self.recipe, self.null_text, open_store(path).name)

    @classmethod
    def load(cls, path: str) -> "EncodingCache":
        """Read a dataset directory."""
        columns, dataset = _load(path, ("latents", "t5_embeds", "clip_pooled"))
        return cls(
            **columns,
            dtype=columns["latents"].dtype,
            recipe=dataset.manifest.recipe,
            null_text=dataset.null_text,
        )


class _TeacherCache:
    """What both teachers' caches share: features ``[N, K, ...]`` at K student times."""

    NAMES: tuple[str, ...]

    def __init__(self, columns: dict[str, Tensor], t_buckets: Tensor, recipe: Recipe | None):
        _same_length(**columns)
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
        _save(path, self._columns, self.recipe, None, open_store(path).name)


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
        columns, dataset = _load(path, cls.NAMES)
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
        columns, dataset = _load(path, cls.NAMES)
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


class DatasetCache:
    """Encodings and, where they were extracted, teacher features of one dataset."""

    def __init__(
        self,
        encodings: EncodingCache,
        lune: LuneFeatureCache | None = None,
        sol: SolFeatureCache | None = None,
        name: str = "dataset",
    ):
        for teacher in (lune, sol):
            if teacher is not None and len(teacher) != len(encodings):
                raise InputError(
                    f"dataset '{name}' has {len(encodings)} encodings, but teacher features of "
                    f"{len(teacher)} samples"
                )
        self.encodings, self.lune, self.sol, self.name = encodings, lune, sol, name

    def __len__(self) -> int:
        return len(self.encodings)

    @classmethod
    def build(
        cls,
        zoo: ModelZoo,
        images: list[Image.Image],
        prompts: list[str],
        name: str = "dataset",
        extract_lune: bool = True,
        extract_sol: bool = True,
    ) -> "DatasetCache":
        """Encode pictures and captions, and run the chosen teachers on the noised pictures."""
        lune = LuneFeatureCache.build(zoo, prompts, images=images) if extract_lune else None
        sol = SolFeatureCache.build(zoo, prompts, images=images) if extract_sol else None
        return cls(EncodingCache.build(zoo, images, prompts), lune, sol, name)

    def save(self, path: str) -> None:
        """Write one dataset directory."""
        parts = [part for part in (self.encodings, self.lune, self.sol) if part is not None]
        columns: dict[str, Tensor] = {}
        recipe = Recipe()
        for part in parts:
            columns.update(part.columns())
            recipe = recipe.merged(part.recipe)
        _save(path, columns, recipe, self.encodings.null_text, self.name)

    @classmethod
    def load(cls, path: str) -> "DatasetCache":
        """Read a dataset directory, of this class or of a build job."""
        manifest = Manifest.load(open_store(path))
        lune = LuneFeatureCache.load(path) if manifest.layout("lune") else None
        sol = SolFeatureCache.load(path) if manifest.layout("sol_stats") else None
        return cls(EncodingCache.load(path), lune, sol, manifest.name)


class MultiSourceCache:
    """Looks up teacher features across datasets; a dataset may lack either teacher."""

    def __init__(self) -> None:
        self._caches: dict[int, DatasetCache] = {}

    def add(self, cache: DatasetCache, dataset_id: int) -> "MultiSourceCache":
        """Make ``cache`` known as ``dataset_id``; returns itself.

        Raises:
            InputError: the id is taken, or the buckets differ from those of the other datasets.
        """
        if dataset_id in self._caches:
            raise InputError(f"dataset_id {dataset_id} is taken: give each dataset its own")
        times = self.t_buckets
        for teacher in (cache.lune, cache.sol):
            if teacher is None or times is None:
                continue
            if not torch.allclose(teacher.t_buckets, times, atol=1e-5):
                raise InputError(f"dataset '{cache.name}' has other time buckets than the others")
        self._caches[dataset_id] = cache
        return self

    @property
    def dataset_ids(self) -> tuple[int, ...]:
        """The ids of the datasets that were added, in order."""
        return tuple(self._caches)

    @property
    def t_buckets(self) -> Tensor | None:
        """Times ``[K]`` of all features; None without any."""
        for cache in self._caches.values():
            for teacher in (cache.lune, cache.sol):
                if teacher is not None:
                    return teacher.t_buckets
        return None

    @property
    def null_text(self) -> Text | None:
        """The empty caption's embeddings, from the first dataset that has them."""
        found = (cache.encodings.null_text for cache in self._caches.values())
        return next((text for text in found if text is not None), None)

    def sol_examples(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Sol's features by bucket of about ``count`` samples, evenly over the datasets.

        Returns:
            Statistics ``[n, K, 4]`` and maps ``[n, K, s, s]``, fp32; None without any.
        """
        parts = [cache.sol for cache in self._caches.values() if cache.sol is not None]
        if not parts:
            return None
        every = -(-sum(map(len, parts)) // count)
        stats, spatial = (
            torch.cat([part.columns()[name][::every] for part in parts]).float()
            for name in SolFeatureCache.NAMES
        )
        return stats, spatial

    def gather(self, local_indices: Tensor, dataset_ids: Tensor) -> dict[str, Tensor | None]:
        """Features by bucket of samples ``[B]`` of datasets ``[B]``, fp32.

        Returns:
            ``lune``, ``sol_stats`` and ``sol_spatial`` ``[B, K, ...]`` (None where no sample has
            one), and ``lune_mask`` and ``sol_mask`` ``[B]``: which samples have theirs; the
            others' rows are zeros.
        """
        local, ids = local_indices.cpu(), dataset_ids.cpu()
        for dataset in set(ids.tolist()) - self._caches.keys():
            raise InputError(f"no dataset was added as {dataset}")
        result: dict[str, Tensor | None] = {}
        for teacher, names in (("lune", LuneFeatureCache.NAMES), ("sol", SolFeatureCache.NAMES)):
            mask = torch.zeros(len(local), dtype=torch.bool)
            found: dict[str, Tensor | None] = dict.fromkeys(names)
            for dataset in set(ids.tolist()):
                part = getattr(self._caches[dataset], teacher)
                if part is None:
                    continue
                here = ids == dataset
                mask |= here
                for name, rows in part.columns().items():
                    chosen = rows[local[here]].float()
                    total = found[name]
                    if total is None:
                        total = chosen.new_zeros(len(local), *chosen.shape[1:])
                        found[name] = total
                    total[here] = chosen
            result.update(found)
            result[f"{teacher}_mask"] = mask if mask.any() else None
        return result

    def get_lune(
        self, local_indices: Tensor, dataset_ids: Tensor, timesteps: Tensor
    ) -> Tensor | None:
        """Lune's features ``[B, D]`` at ``timesteps`` ``[B]``; None if no sample has them."""
        return self._at("lune", local_indices, dataset_ids, timesteps)

    def get_sol(
        self, local_indices: Tensor, dataset_ids: Tensor, timesteps: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sol's statistics ``[B, 4]`` and maps ``[B, s, s]``; None if no sample has them."""
        return (
            self._at("sol_stats", local_indices, dataset_ids, timesteps),
            self._at("sol_spatial", local_indices, dataset_ids, timesteps),
        )

    def _at(self, name: str, local: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor | None:
        rows, times = self.gather(local, ids)[name], self.t_buckets
        if rows is None or times is None:
            return None
        return interpolate_buckets(rows, times, timesteps.cpu()).to(timesteps.device)
