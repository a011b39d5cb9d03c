"""A finished dataset, opened and checked for training."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyflux.cache.manifest import MODEL_SETTINGS, FileInfo, Manifest, ShardInfo
from tinyflux.cache.schema import GROUPS, KEY, ROWS
from tinyflux.cache.shards import SHARD_FOLDER, ShardReader, read_null_text
from tinyflux.cache.store import open_store
from tinyflux.errors import CacheError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.util.config import parse_dtype


class CachedDataset:
    """Random access to the rows of a dataset; memory stays bounded.

    Args:
        path: a directory, or a URL, whose files are copied to this machine as they are read.
        check_files: see that every file is there with its full size, which on network storage is
            work for its server.
        manifest: what is read of it; left out, all that its own manifest lists.

    Raises:
        CacheError: no manifest, a file that is missing or cut short, or a newer format.
    """

    def __init__(
        self, path: str | Path, check_files: bool = True, manifest: Manifest | None = None
    ):
        self.path = str(path)
        self._store = open_store(path)
        self.manifest = Manifest.load(self._store) if manifest is None else manifest
        sizes = self._store.list(SHARD_FOLDER) if check_files else {}
        for file in self.manifest.files if check_files else ():
            size = sizes[file.path] if file.path in sizes else self._store.size(file.path)
            if size != file.bytes:
                raise CacheError(
                    f"the cache '{self.path}' is damaged: '{file.path}' is missing or not "
                    f"{file.bytes} bytes long; `tinyflux cache repair` makes it again"
                )
        self._reader = ShardReader(self._store)
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards])

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which knows every file by its own."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    @property
    def t_buckets(self) -> Tensor:
        """Student times ``[K]`` of the teacher features."""
        return torch.tensor(self.manifest.recipe.t_buckets or ())

    @property
    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, fp32."""
        file = self.manifest.null_text
        return None if file is None else read_null_text(self._store, file)

    def keys(self) -> list[str]:
        """Every row's key, in order."""
        return list(self.each("keys"))

    def each(self, what: str) -> Iterator[str]:
        """Row by row, in order: the rows' ``"keys"``, or digests of their ``"pictures"``.

        A dataset made of tensors has keys for pictures. One shard at a time is in memory.
        """
        if what == "pictures" and ROWS in self.manifest.groups:
            return self._strings(ROWS, "picture")
        return self._strings(self.manifest.groups[0], KEY)

    def captions(self) -> list[str]:
        """Every row's caption, in order."""
        return list(self._strings(ROWS, "caption"))

    def sources(self) -> list[str]:
        """The picture file that every row came from, in order."""
        return list(self._strings(ROWS, "source"))

    def _strings(self, group: str, column: str) -> Iterator[str]:
        if group not in self.manifest.groups:
            raise CacheError(f"the cache '{self.path}' holds no {column}s: it was made of tensors")
        for shard in self.manifest.shards:
            dropped = set(shard.dropped)
            texts = self._reader.strings(shard, group, column)
            yield from (text for row, text in enumerate(texts) if row not in dropped)

    def grids(self) -> list[tuple[tuple[int, int], range]]:
        """Runs of rows with latents of one height and width, in order."""
        found: list[tuple[tuple[int, int], range]] = []
        for shard, end in zip(self.manifest.shards, self._ends.tolist(), strict=True):
            height, width = shard.files["latents"].columns["latents"].shape[1:]
            start = end - shard.samples
            if found and found[-1][0] == (height, width):
                start = found.pop()[1].start
            found.append(((height, width), range(start, end)))
        return found

    def read(
        self,
        indices: Sequence[int],
        as_stored: bool = False,
        groups: Collection[str] = tuple(GROUPS),
        draws: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Rows as fp32 tensors, or ``as_stored`` ones, in the order asked for.

        Args:
            groups: of columns, to read no others (see ``tinyflux.cache.schema``).
            draws: ``[B]`` from 0 to below 1, which decide on one of the picture's variants for
                each row; None reads the plain one.

        Returns:
            ``latents`` ``[B, C, h, w]``, ``t5_embeds`` ``[B, L, D]``, ``clip_pooled`` ``[B, P]``
            and, where the dataset has them, ``mask`` ``[B, h, w]``, ``lune`` ``[B, K, D]``,
            ``sol_stats`` ``[B, K, 4]``, ``sol_spatial`` ``[B, K, s, s]``.

        Raises:
            CacheError: there is no such row, or the rows' latents have several sizes.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise CacheError(f"the cache '{self.path}' has rows 0 to {len(self) - 1} only")
        reads = self._plan_reads(wanted, groups, draws)
        self._reader.open([read.shard.files[group] for read in reads for _, group in read.files])
        result: dict[str, Tensor] = {}
        for read in reads:
            for names, group in read.files:
                for column in (name for name in names if name in read.shard.files[group].columns):
                    rows = _column_of(result, column, read.shard.files[group], len(wanted))
                    self._reader.read_into(rows, read.places, read.shard, group, column, read.rows)
        return result if as_stored else {name: part.float() for name, part in result.items()}

    def _plan_reads(
        self, wanted: np.ndarray, groups: Collection[str], draws: np.ndarray | None
    ) -> list["_Read"]:
        """What is read of each shard and variant for the rows ``wanted``; see :meth:`read`."""
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        variants, variant_of = self.manifest.variants, np.zeros(len(wanted), np.int64)
        if draws is not None:
            last = len(variants) - 1
            variant_of = np.minimum(np.floor(draws * len(variants)), last).astype(np.int64)
        reads = []
        for number in np.unique(shard_of).tolist():
            inside, shard = shard_of == number, self.manifest.shards[number]
            for variant in np.unique(variant_of[inside]).tolist():
                places = np.nonzero(inside & (variant_of == variant))[0]
                rows = wanted[places] - (self._ends[number] - shard.samples)
                if shard.dropped:
                    rows = np.delete(np.arange(shard.rows), shard.dropped)[rows]
                files = list(_files_of(shard, variants[variant], groups))
                reads.append(_Read(shard, files, rows, places))
        return reads

    def check(self, model: TinyFluxConfig, use_lune: bool, use_sol: bool) -> None:
        """Refuse to train ``model`` on a dataset that was made for another.

        Raises:
            CacheError: names the field that differs and both values.
        """
        recipe = self.manifest.recipe
        for name in MODEL_SETTINGS:
            made, wanted = getattr(recipe, name), getattr(model, name)
            if made is not None and made != wanted:
                raise CacheError(
                    f"the cache '{self.path}' was made with {name} = {_show(made)}, the model has "
                    f"{_show(wanted)}: build another cache or change model.{name}"
                )
        widths = [("latents", "in_channels", 0), ("t5_embeds", "t5_hidden_size", 1)]
        widths += [("clip_pooled", "pooled_projection_dim", 0)]
        for teacher, used, column in (
            ("lune", use_lune and model.use_lune_expert, "lune"),
            ("sol", use_sol and model.use_sol_prior, "sol_stats"),
        ):
            if not used:
                continue
            if self.manifest.layout(column) is None:
                raise CacheError(
                    f"the cache '{self.path}' has no {teacher} features: build it with "
                    f"cache.extract_{teacher} or set trainer.enable_{teacher}=false"
                )
            if teacher == "lune":
                widths.append(("lune", "lune_expert_dim", 1))
            else:
                widths.append(("sol_spatial", "sol_spatial_size", 1))
        for column, field, axis in widths:
            layout = self.manifest.layout(column)
            if layout is None:
                raise CacheError(f"the cache '{self.path}' has no column '{column}'")
            if layout.shape[axis] != getattr(model, field):
                raise CacheError(
                    f"the cache '{self.path}' holds {column} of width {layout.shape[axis]}, "
                    f"model.{field} is {getattr(model, field)}"
                )


class _Read(NamedTuple):
    """Rows of one shard and one variant of its pictures.

    Attributes:
        files: columns, and the group of the file that they are in.
        rows: ``[N]``, in the files; ``places``: ``[N]``, in the result.
    """

    shard: ShardInfo
    files: list[tuple[tuple[str, ...], str]]
    rows: np.ndarray
    places: np.ndarray


def _column_of(result: dict[str, Tensor], column: str, file: FileInfo, count: int) -> Tensor:
    """The ``[count, ...]`` of a column in ``result``, made when it is met first.

    Raises:
        CacheError: ``file`` has it in another size.
    """
    layout = file.columns[column]
    if column not in result:
        result[column] = torch.empty(count, *layout.shape, dtype=parse_dtype(layout.dtype))
    elif result[column].shape[1:] != layout.shape:
        raise CacheError(
            f"the rows asked for have {column} of several sizes: read the rows of one size at a "
            "time"
        )
    return result[column]


def _files_of(
    shard: ShardInfo, variant: str, groups: Collection[str]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The files of a shard that hold a variant of its pictures: their columns, and their group."""
    for group in shard.files:
        if (
            group != ROWS and group in groups
        ):  # of the plain one: the others' have names of their own
            other = f"{group}-{variant}"
            yield GROUPS[group], other if other in shard.files else group


def _show(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
