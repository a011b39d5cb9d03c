"""Several caches as one dataset, each with its weight in training."""

import hashlib
import heapq
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tinyflux.cache.config import MixSource
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.schema import GROUPS
from tinyflux.errors import CacheError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.text import NullText, same_null_text

# What a sample of a cache without the teacher has instead; its mask is False.
TEACHERS = {"lune": ("lune",), "sol": ("sol_stats", "sol_spatial")}


class CacheMixture:
    """Caches one behind the other; a mixture of one is that cache.

    Args:
        check_files, manifests: see :class:`CachedDataset`; a manifest for each cache.

    Attributes:
        t_buckets: ``[K]`` student times of the teachers' features.
        null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, fp32, or None.

    Raises:
        CacheError: a cache that cannot be opened, or caches whose teachers were asked at different
            times or whose captions were read by different encoders.
    """

    def __init__(
        self,
        sources: Sequence[MixSource],
        check_files: bool = True,
        manifests: Sequence[Manifest] | None = None,
    ):
        self.sources = list(sources)
        known: Sequence[Manifest | None] = manifests or [None] * len(self.sources)
        self.caches = [
            CachedDataset(source.path, check_files, manifest)
            for source, manifest in zip(self.sources, known, strict=True)
        ]
        self._ends = np.cumsum([len(cache) for cache in self.caches])
        times = [cache.t_buckets.tolist() for cache in self.caches if cache.t_buckets.numel()]
        if any(one != times[0] for one in times):
            raise CacheError(
                "the caches' teacher features are of different times: build them alike"
            )
        self.t_buckets = torch.tensor(times[0] if times else [])
        self.null_text = _common_null_text(self.caches)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows_of(self, source: int) -> range:
        """The rows of one cache."""
        end = int(self._ends[source])
        return range(end - len(self.caches[source]), end)

    def grids(self, source: int) -> list[tuple[tuple[int, int], range]]:
        """Runs of rows of one cache with latents of one height and width, in order."""
        start = self.rows_of(source).start
        return [
            (grid, range(run.start + start, run.stop + start))
            for grid, run in self.caches[source].grids()
        ]

    @property
    def has_variants(self) -> bool:
        """Whether pictures of some cache have other variants than the plain one."""
        return any(len(cache.manifest.variants) > 1 for cache in self.caches)

    def sizes(self) -> int:
        """How many heights and widths of latents there are."""
        return len({grid for index in range(len(self.caches)) for grid, _ in self.grids(index)})

    def held_out(self, fraction: float) -> np.ndarray:
        """Which rows are held out, ``[rows]`` bool, by a hash of each row's picture alone.

        All captions of a picture are on the same side.
        """
        mask = np.zeros(len(self), dtype=bool)
        limit = int(fraction * 2**64)
        for row, picture in enumerate(self._each("pictures") if limit else ()):
            digest = hashlib.blake2b(picture.encode(), digest_size=8, person=b"held-out").digest()
            mask[row] = int.from_bytes(digest, "little") < limit
        return mask

    def smallest_keys(self, chosen: np.ndarray, count: int) -> list[tuple[str, int]]:
        """The ``count`` smallest keys among rows ``chosen`` (``[rows]`` bool), with their rows."""
        keys = ((key, row) for row, key in enumerate(self._each("keys")) if chosen[row])
        return heapq.nsmallest(count, keys)

    def _each(self, what: str) -> Iterator[str]:
        for cache in self.caches:
            yield from cache.each(what)

    def read(
        self,
        indices: Sequence[int],
        as_stored: bool = False,
        groups: Collection[str] = tuple(GROUPS),
        draws: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Rows as :meth:`CachedDataset.read` gives them.

        Where only some of the caches asked have a teacher's features or a foreground mask, the
        others' samples have zeros, with ``lune_mask`` or ``sol_mask`` ``[B]`` False, or ones.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(self.caches) == 1:
            return self.caches[0].read(wanted.tolist(), as_stored, groups, draws)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise CacheError(f"the caches have rows 0 to {len(self) - 1} only")
        source_of = np.searchsorted(self._ends, wanted, side="right")
        parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        for source in np.unique(source_of):
            places = np.nonzero(source_of == source)[0]
            rows = wanted[places] - self.rows_of(int(source)).start
            own = None if draws is None else draws[places]
            found = self.caches[source].read(rows.tolist(), as_stored, groups, own)
            parts.append((torch.from_numpy(places), found))
        return _joined(parts, len(wanted))

    def check(self, model: TinyFluxConfig, use_lune: bool, use_sol: bool) -> None:
        """Refuse to train ``model`` on caches that were made for another.

        A teacher that is used must be in one of them at least.

        Raises:
            CacheError: names the cache and the field that differs.
        """
        for teacher, used in (("lune", use_lune), ("sol", use_sol)):
            column = TEACHERS[teacher][0]
            have = [cache.manifest.layout(column) is not None for cache in self.caches]
            for cache, there in zip(self.caches, have, strict=True):
                # If none has it, the first says so.
                needed = used and (there or not any(have))
                cache.check(model, needed and teacher == "lune", needed and teacher == "sol")


def _common_null_text(caches: Sequence[CachedDataset]) -> NullText | None:
    """The empty caption's embeddings, those of the first cache that has them."""
    known = [(cache.path, text) for cache in caches if (text := cache.null_text) is not None]
    for path, text in known[1:]:
        if not same_null_text(text, known[0][1]):
            raise CacheError(
                f"the caches '{known[0][0]}' and '{path}' hold different embeddings of the empty "
                "caption, so their captions were not encoded alike: build one of them again with "
                "the text encoders and settings of the other"
            )
    return known[0][1] if known else None


def _joined(parts: list[tuple[Tensor, dict[str, Tensor]]], count: int) -> dict[str, Tensor]:
    """Samples of several caches in the order asked for."""
    names = {name for _, part in parts for name in part}
    result: dict[str, Tensor] = {}
    for name in names:
        like = next(part[name] for _, part in parts if name in part)
        whole = like.new_ones if name == "mask" else like.new_zeros
        result[name] = whole(count, *like.shape[1:])
        for places, part in parts:
            if name in part:
                if part[name].shape[1:] != like.shape[1:]:
                    raise CacheError(
                        f"the caches' {name} have different sizes: "
                        f"{list(like.shape[1:])} and {list(part[name].shape[1:])}"
                    )
                result[name][places] = part[name]
    for teacher, columns in TEACHERS.items():
        if columns[0] in names:
            there = torch.zeros(count, dtype=torch.bool)
            for places, part in parts:
                there[places] = columns[0] in part
            result[f"{teacher}_mask"] = there
    return result
