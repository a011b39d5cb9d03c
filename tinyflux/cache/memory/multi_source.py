"""Several datasets' teacher features, found by (index, dataset)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinyflux.cache.memory.dataset import DatasetCache
from tinyflux.cache.memory.teachers import LuneFeatureCache, SolFeatureCache
from tinyflux.errors import InputError
from tinyflux.model.text import NullText, same_null_text
from tinyflux.util.buckets import interpolate_buckets


class MultiSourceCache:
    """Looks up teacher features across datasets; a dataset may lack either teacher."""

    def __init__(self) -> None:
        self._caches: dict[int, DatasetCache] = {}

    def add(self, cache: DatasetCache, dataset_id: int) -> "MultiSourceCache":
        """Make ``cache`` known as ``dataset_id``; returns itself.

        Raises:
            InputError: the id is taken, or the dataset's time buckets or its embeddings of the
                empty caption differ from those of the others.
        """
        if dataset_id in self._caches:
            raise InputError(f"dataset_id {dataset_id} is taken: give each dataset its own")
        times = self.t_buckets
        for teacher in (cache.lune, cache.sol):
            if teacher is None or times is None:
                continue
            if not torch.allclose(teacher.t_buckets, times, atol=1e-5):
                raise InputError(f"dataset '{cache.name}' has other time buckets than the others")
        ours, text = self.null_text, cache.encodings.null_text
        if ours is not None and text is not None and not same_null_text(text, ours):
            raise InputError(
                f"dataset '{cache.name}' has other embeddings of the empty caption than the "
                "others, so their captions were not encoded alike: build them with one zoo"
            )
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
    def null_text(self) -> NullText | None:
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
        lune = {dataset: cache.lune for dataset, cache in self._caches.items()}
        sol = {dataset: cache.sol for dataset, cache in self._caches.items()}
        return {
            **_gather(lune, LuneFeatureCache.NAMES, "lune_mask", local, ids),
            **_gather(sol, SolFeatureCache.NAMES, "sol_mask", local, ids),
        }

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


def _gather(
    parts: Mapping[int, LuneFeatureCache | None] | Mapping[int, SolFeatureCache | None],
    names: Sequence[str],
    mask_name: str,
    local: Tensor,
    ids: Tensor,
) -> dict[str, Tensor | None]:
    """One teacher's part of :meth:`MultiSourceCache.gather`."""
    mask = torch.zeros(len(local), dtype=torch.bool)
    gathered: dict[str, Tensor | None] = dict.fromkeys(names)
    for dataset in set(ids.tolist()):
        part = parts[dataset]
        if part is None:
            continue
        here = ids == dataset
        mask |= here
        for name, rows in part.columns().items():
            chosen = rows[local[here]].float()
            total = gathered[name]
            if total is None:
                total = gathered[name] = chosen.new_zeros(len(local), *chosen.shape[1:])
            total[here] = chosen
    return {**gathered, mask_name: mask if mask.any() else None}
