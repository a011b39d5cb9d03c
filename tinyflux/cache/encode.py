"""A planned shard to files: what a build job's actor does, without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.config import DataConfig
from tinyflux.cache.extract import Extractor, Sample
from tinyflux.cache.keys import Size, content_keys, digest_of
from tinyflux.cache.partition import read_rows
from tinyflux.cache.receipts import Receipt, group_path
from tinyflux.cache.reuse import CONTENT_COLUMNS, Reused, batches
from tinyflux.cache.rows import Row
from tinyflux.cache.schema import GROUPS
from tinyflux.cache.shards import ShardReader, finite_rows, write_group
from tinyflux.cache.sources import decode_mask, decode_picture, fit_mask, fit_picture, open_pictures
from tinyflux.cache.store import Store
from tinyflux.errors import InputError

NEEDS_PICTURES = ("latents", "mask", "lune", "sol")


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
        computed = {contents[row]: place for place, row in enumerate(work.made)}
        refused = {contents[row]: reason for row, reason in work.rejected(group).items()}
        rejected = [(row, refused[key]) for row, key in enumerate(contents) if key in refused]
        file = None
        if len(rejected) < len(keys):
            old = self._former(group, reused)
            names = [name for name in GROUPS[group] if name in old or name in work.columns]
            columns: dict[str, Tensor] = {}
            for name in names:
                like = old[name] if name in old else work.columns[name]
                columns[name] = like.new_zeros(len(keys), *like.shape[1:])
                if old:
                    columns[name][torch.tensor([row for row, _, _ in reused.rows])] = old[name]
                new = [(row, computed[k]) for row, k in enumerate(contents) if k in computed]
                if new:
                    targets, places = (torch.tensor(side) for side in zip(*new, strict=True))
                    columns[name][targets] = work.columns[name][places]
                columns[name][[row for row, _ in rejected]] = 0
            path = group_path(task.name, group, fingerprint)
            file = write_group(self._store, path, keys, columns, self._trim)
        receipt = Receipt(
            task.name, group, fingerprint, len(keys), task.size, file, rejected, len(work.made),
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
        for name in (name for name in GROUPS[group] if name in there_are):
            parts: list[Tensor | None] = [None] * len(reused.rows)
            for number, shard in enumerate(reused.shards):
                places = [at for at, (_, which, _) in enumerate(reused.rows) if which == number]
                there = np.array([reused.rows[at][2] for at in places])
                values = reader.tensor(shard, group, name, there)
                for at, value in zip(places, values, strict=True):
                    parts[at] = value
            found[name] = torch.stack([part for part in parts if part is not None])
        return found


class ShardWork:
    """Rows of a shard on their way through the models.

    Attributes:
        made: rows in the order of ``columns``.
    """

    def __init__(
        self,
        extractor: Extractor,
        data: DataConfig,
        rows: Sequence[Row],
        size: Size,
        groups: Sequence[str],
    ):
        self._extractor, self._data, self._rows = extractor, data, rows
        self._size, self._groups = size, groups
        self.made: list[int] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._refused: dict[int, str] = {}

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """By name, ``[len(made), ...]`` fp16; after the last row was added."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}

    def rejected(self, group: str) -> dict[int, str]:
        """Rows that cannot be used, with the reason."""
        found = dict(self._refused)
        for name in GROUPS[group]:
            if name in self.columns:
                fine = finite_rows(self.columns[name])
                for row, good in zip(self.made, fine.tolist(), strict=True):
                    if not good:
                        found[row] = f"{name} is not finite in float16"
        return found

    def add(self, batch: list[int]) -> None:
        """Read and encode rows of the shard.

        Raises:
            InputError: a picture is not what it was when it was indexed.
        """
        pictures = self._pictures(batch) if set(self._groups) & set(NEEDS_PICTURES) else {}
        chosen = {row: self._rows[row] for row in batch}
        self._encode(
            [
                (row, Sample(sample.key, sample.caption, *pictures.get(row, ())))
                for row, sample in chosen.items()
            ]
        )

    def _encode(self, samples: list[tuple[int, Sample]]) -> None:
        if not samples:
            return
        try:
            columns = self._extractor.columns(self._groups, [sample for _, sample in samples])
        except InputError as error:  # such as a size that a VAE cannot halve
            if len(samples) == 1:
                self._refused[samples[0][0]] = str(error)
            else:
                for sample in samples:
                    self._encode([sample])
            return
        self.made += [row for row, _ in samples]
        for name, rows in columns.items():
            self._parts.setdefault(name, []).append(rows)

    def _pictures(self, batch: list[int]) -> dict[int, tuple[Image.Image, Image.Image | None]]:
        """Picture and mask of each row, at the shard's size."""
        rows, most, found = self._rows, self._data.max_pixels, {}
        masked = [row for row in batch if "mask" in self._groups and rows[row].mask_locator]
        masks = dict(
            self._contents(masked, lambda row: row.mask_locator, lambda row: row.mask_picture)
        )
        files = self._contents(batch, lambda row: row.locator, lambda row: row.picture)
        for row, content in files:
            name, mask = rows[row].source, None
            image = decode_picture(content, name, most)
            if row in masks:
                mask = fit_mask(decode_mask(masks[row], name, image.size, most), self._size)
            found[row] = (fit_picture(image, self._size), mask)
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
