"""A planned shard to files: what a build job's actor does, without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.config import DataConfig
from tinyflux.cache.extract import Extractor, Sample
from tinyflux.cache.keys import Size, base_of, content_keys, digest_of, variant_of
from tinyflux.cache.partition import read_rows
from tinyflux.cache.receipts import Receipt, group_path
from tinyflux.cache.reuse import CONTENT_COLUMNS, Reused, batches
from tinyflux.cache.rows import Row
from tinyflux.cache.schema import PIXEL_GROUPS, column_names
from tinyflux.cache.shards import ShardReader, finite_rows, write_group
from tinyflux.cache.sources import decode_mask, decode_picture, open_pictures
from tinyflux.cache.store import Store
from tinyflux.cache.variants import Variant
from tinyflux.errors import InputError


@dataclass(frozen=True)
class ShardTask:
    """What is to be made of a shard.

    Attributes:
        rows_file: lists its samples, relative to the dataset.
        fingerprints: the groups to make, each with its ``GroupInfo.fingerprint``.
        reused: by group, what other files hold already.
    """

    name: str
    size: Size
    rows_file: str
    fingerprints: dict[str, str]
    reused: dict[str, Reused]


class ShardEncoder:
    """Writes the files and receipts of tasks.

    Args:
        trim_text: see :func:`tinyflux.cache.shards.write_shard`.
    """

    def __init__(self, store: Store, data: DataConfig, extractor: Extractor, trim_text: bool):
        self._store, self._data, self._trim = store, data, trim_text
        self.extractor = extractor

    def __call__(self, task: ShardTask) -> None:
        """Make every group of ``task``.

        Raises:
            CacheError, OSError: nothing half-written counts.
        """
        rows = read_rows(self._store, task.rows_file)
        columns = {name: [getattr(row, name) for row in rows] for name in CONTENT_COLUMNS}
        contents = {group: content_keys(group, columns, task.size) for group in task.fingerprints}
        # Groups that lack the same rows are made together, from one reading of the pictures.
        together: dict[tuple[int, ...], list[str]] = {}
        for group, keys in contents.items():
            known = {keys[row] for row, _, _ in task.reused[group].rows}
            lacking = dict.fromkeys(keys)  # a caption or picture that comes twice is encoded once
            first = {key: row for row, key in reversed(list(enumerate(keys)))}
            missing = tuple(first[key] for key in lacking if key not in known)
            together.setdefault(missing, []).append(group)
        for missing, groups in together.items():
            started = time.monotonic()
            work = ShardWork(self.extractor, self._data, rows, task.size, groups)
            for batch in batches(missing, self.extractor.batch_size):
                work.add(batch)
            seconds = (time.monotonic() - started) / len(groups)
            for group in groups:
                self._commit(task, group, contents[group], rows, work, seconds)

    def _commit(
        self,
        task: ShardTask,
        group: str,
        contents: Sequence[str],
        rows: Sequence[Row],
        work: "ShardWork",
        seconds: float,
    ) -> None:
        """Join what was computed with what was reused, write the file, then its receipt."""
        fingerprint, reused = task.fingerprints[group], task.reused[group]
        keys = [row.key for row in rows]
        made, columns_made = work.made(group), work.columns(group)
        computed = {contents[row]: place for place, row in enumerate(made)}
        refused = {contents[row]: reason for row, reason in work.rejected(group).items()}
        rejected = [(row, refused[key]) for row, key in enumerate(contents) if key in refused]
        file = None
        if len(rejected) < len(keys):
            old = self._former(group, reused)
            names = [name for name in column_names(group) if name in old or name in columns_made]
            columns: dict[str, Tensor] = {}
            for name in names:
                like = old[name] if name in old else columns_made[name]
                columns[name] = like.new_zeros(len(keys), *like.shape[1:])
                if old:
                    columns[name][torch.tensor([row for row, _, _ in reused.rows])] = old[name]
                new = [(row, computed[k]) for row, k in enumerate(contents) if k in computed]
                if new:
                    targets, places = (torch.tensor(side) for side in zip(*new, strict=True))
                    columns[name][targets] = columns_made[name][places]
                columns[name][[row for row, _ in rejected]] = 0
            path = group_path(task.name, group, fingerprint)
            file = write_group(self._store, path, keys, columns, self._trim)
        receipt = Receipt(
            task.name, group, fingerprint, len(keys), task.size, file, rejected, len(made),
            round(seconds, 3), self._cut([row.caption for row in rows]) if group == "text" else "",
        )  # fmt: skip
        receipt.save(self._store)

    def _cut(self, captions: Sequence[str]) -> str:
        """See ``Receipt.cut``; of rows that were reused as well, whose counts no file holds."""
        counts = enumerate(self.extractor.zoo.cut_tokens(captions))
        return " ".join(f"{row}:{cut.clip}:{cut.t5}" for row, cut in counts if any(cut))

    def _former(self, group: str, reused: Reused) -> dict[str, Tensor]:
        """The reused rows' columns, in the order of ``reused.rows``."""
        if not reused.rows:
            return {}
        reader, found = ShardReader(self._store), {}
        there_are = reused.shards[0].files[group].columns
        for name in (name for name in column_names(group) if name in there_are):
            parts: list[Tensor | None] = [None] * len(reused.rows)
            for number, shard in enumerate(reused.shards):
                places = [at for at, (_, which, _) in enumerate(reused.rows) if which == number]
                there = np.array([reused.rows[at][2] for at in places])
                values = reader.tensor(shard, group, name, there)
                for at, value in zip(places, values, strict=True):
                    parts[at] = value
            found[name] = torch.stack([part for part in parts if part is not None])
        return found


@dataclass
class _Encoded:
    """What is made of one variant of a shard's pictures.

    Attributes:
        groups: wanted, by the plain variant's names.
        made: rows in the order of ``columns``.
        refused: rows that cannot be encoded, with the reason.
    """

    groups: list[str] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class ShardWork:
    """Rows of a shard on their way through the models.

    A picture is read once for all of its variants.
    """

    def __init__(
        self,
        extractor: Extractor,
        data: DataConfig,
        rows: Sequence[Row],
        size: Size,
        groups: Sequence[str],
    ):
        self._extractor, self._data, self._rows, self._size = extractor, data, rows, size
        self._encoded: dict[str, _Encoded] = {}
        for group in groups:
            self._encoded.setdefault(variant_of(group), _Encoded()).groups.append(base_of(group))
        self._groups = {base_of(group) for group in groups}

    def made(self, group: str) -> list[int]:
        """Rows in the order of :meth:`columns`."""
        return self._encoded[variant_of(group)].made

    def columns(self, group: str) -> dict[str, Tensor]:
        """By name, ``[len(made), ...]`` fp16; after the last row was added."""
        found = self._encoded[variant_of(group)].columns
        return {name: found[name] for name in column_names(group) if name in found}

    def rejected(self, group: str) -> dict[int, str]:
        """Rows that cannot be used, with the reason."""
        found = dict(self._encoded[variant_of(group)].refused)
        for name, column in self.columns(group).items():
            fine = finite_rows(column)
            for row, good in zip(self.made(group), fine.tolist(), strict=True):
                if not good:
                    found[row] = f"{name} is not finite in float16"
        return found

    def add(self, batch: list[int]) -> None:
        """Read and encode rows of the shard.

        Raises:
            InputError: a picture is not what it was when it was indexed.
        """
        pictures = self._pictures(batch) if self._groups & set(PIXEL_GROUPS) else {}
        for name, into in self._encoded.items():
            key = Variant.named(name).key
            samples = [
                (row, Sample(key(sample.key), sample.caption, *pictures.get((row, name), ())))
                for row, sample in ((row, self._rows[row]) for row in batch)
            ]
            self._encode(into, samples)

    def _encode(self, into: _Encoded, samples: list[tuple[int, Sample]]) -> None:
        if not samples:
            return
        try:
            columns = self._extractor.columns(into.groups, [sample for _, sample in samples])
        except InputError as error:  # such as a size that a VAE cannot halve
            if len(samples) == 1:
                into.refused[samples[0][0]] = str(error)
            else:
                for sample in samples:
                    self._encode(into, [sample])
            return
        into.made += [row for row, _ in samples]
        for name, rows in columns.items():
            into.parts.setdefault(name, []).append(rows)

    def _pictures(
        self, batch: list[int]
    ) -> dict[tuple[int, str], tuple[Image.Image, Image.Image | None]]:
        """Picture and mask of each row and variant, at the shard's size."""
        rows, size, most, found = self._rows, self._size, self._data.max_pixels, {}
        masked = [row for row in batch if "mask" in self._groups and rows[row].mask_locator]
        masks = dict(
            self._contents(masked, lambda row: row.mask_locator, lambda row: row.mask_picture)
        )
        files = self._contents(batch, lambda row: row.locator, lambda row: row.picture)
        for row, content in files:
            name, mask = rows[row].source, None
            image = decode_picture(content, name, most)
            if row in masks:
                mask = decode_mask(masks[row], name, image.size, most)
            for variant_name in self._encoded:
                variant = Variant.named(variant_name)
                box = variant.box(
                    rows[row].picture, image.size, size, self._data.variants, self._extractor.seed
                )
                shown = None if mask is None else variant.mask(mask, size, box)
                found[row, variant_name] = variant.picture(image, size, box), shown
        return found

    def _contents(
        self, batch: list[int], locator: Callable[[Row], str], digest: Callable[[Row], str]
    ) -> Iterator[tuple[int, bytes]]:
        """Rows with their files, which are made sure to be those that were indexed."""
        files = open_pictures(self._data, [locator(self._rows[row]) for row in batch])
        for row, content in zip(batch, files, strict=True):
            # Not a reason to leave the sample out: the next run may find the file again.
            if isinstance(content, Exception) or digest_of(content) != digest(self._rows[row]):
                raise InputError(
                    f"'{self._rows[row].source}' was changed or removed while the cache was "
                    f"built: run the same command again to continue with what is there now"
                )
            yield row, content
