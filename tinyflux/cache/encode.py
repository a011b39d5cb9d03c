"""A planned shard to files: what a build job's actor does, without Ray."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from tinyflux.cache.extract import Extractor, Sample
from tinyflux.cache.keys import Size, content_keys, digest_of
from tinyflux.cache.receipts import Receipt, group_path
from tinyflux.cache.reuse import CONTENT_COLUMNS, Reused, batches
from tinyflux.cache.schema import GROUPS, KEY
from tinyflux.cache.shards import ShardReader, finite_rows, write_group
from tinyflux.cache.sources import (
    DataConfig,
    decode_mask,
    decode_picture,
    fit_mask,
    fit_picture,
    open_pictures,
)
from tinyflux.errors import InputError

NEEDS_PICTURES = ("latents", "mask", "lune", "sol")


@dataclass(frozen=True)
class ShardTask:
    """What is to be made of a shard.

    Attributes:
        rows_file: lists its samples, relative to the dataset.
        makers: the groups to make, each with its ``GroupInfo.maker``.
        reused: by group, what other files hold already.
    """

    name: str
    size: Size
    rows_file: str
    makers: dict[str, str]
    reused: dict[str, Reused]


class ShardEncoder:
    """Writes the files and receipts of tasks.

    Args:
        trim_text: see :func:`tinyflux.cache.shards.write_shard`.
    """

    def __init__(self, directory: Path, data: DataConfig, extractor: Extractor, trim_text: bool):
        self._directory, self._data, self._trim = directory, data, trim_text
        self.extractor = extractor

    def __call__(self, task: ShardTask) -> None:
        """Make every group of ``task``.

        Raises:
            CacheError, OSError: nothing half-written counts.
        """
        table = pq.read_table(self._directory / task.rows_file)
        rows: dict[str, list[str]] = {name: table[name].to_pylist() for name in table.column_names}
        contents = {
            group: content_keys(group, {c: rows[c] for c in CONTENT_COLUMNS}, task.size)
            for group in task.makers
        }
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
                self._commit(task, group, contents[group], rows[KEY], work, seconds)

    def _commit(
        self,
        task: ShardTask,
        group: str,
        contents: Sequence[str],
        keys: list[str],
        work: "ShardWork",
        seconds: float,
    ) -> None:
        """Join what was computed with what was reused, write the file, then its receipt."""
        maker, reused = task.makers[group], task.reused[group]
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
            path = group_path(task.name, group, maker)
            file = write_group(self._directory, path, keys, columns, self._trim)
        receipt = Receipt(
            task.name, group, maker, len(keys), task.size, file, rejected, len(work.made),
            round(seconds, 3),
        )  # fmt: skip
        receipt.save(self._directory)

    def _former(self, group: str, reused: Reused) -> dict[str, Tensor]:
        """The reused rows' columns, in the order of ``reused.rows``."""
        if not reused.rows:
            return {}
        reader, found = ShardReader(self._directory), {}
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
        rows: dict[str, list[str]],
        size: Size,
        groups: Sequence[str],
    ):
        self._extractor, self._data, self._rows = extractor, data, rows
        self._size, self._groups = size, groups
        self.made: list[int] = []
        self._parts: dict[str, list[Tensor]] = {}
        self._refused: dict[int, str] = {}

    @property
    def columns(self) -> dict[str, Tensor]:
        """By name, ``[len(made), ...]`` fp16."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}

    def rejected(self, group: str) -> dict[int, str]:
        """Rows that cannot be used, with the reason."""
        found = dict(self._refused)
        for name in GROUPS[group]:
            if name in self._parts:
                fine = finite_rows(torch.cat(self._parts[name]))
                for row, good in zip(self.made, fine.tolist(), strict=True):
                    if not good:
                        found[row] = f"{name} is not finite in float16"
        return found

    def add(self, batch: list[int]) -> None:
        """Read and encode rows of the shard."""
        samples = []
        for row, picture in zip(batch, self._pictures(batch), strict=True):
            if isinstance(picture, Exception):
                self._refused[row] = str(picture)
            else:
                key, caption = self._rows[KEY][row], self._rows["caption"][row]
                samples.append((row, Sample(key, caption, *picture)))
        self._encode(samples)

    def _encode(self, samples: list[tuple[int, Sample]]) -> None:
        if not samples:
            return
        try:
            columns = self._extractor.columns(self._groups, [sample for _, sample in samples])
        except InputError as error:  # such as a caption that is too long
            if len(samples) == 1:
                self._refused[samples[0][0]] = str(error)
            else:
                for sample in samples:
                    self._encode([sample])
            return
        self.made += [row for row, _ in samples]
        for name, rows in columns.items():
            self._parts.setdefault(name, []).append(rows)

    def _pictures(
        self, batch: list[int]
    ) -> Iterator[tuple[Image.Image | None, Image.Image | None] | Exception]:
        """Picture and mask of each row at the shard's size, or why there is none."""
        if not set(self._groups) & set(NEEDS_PICTURES):
            yield from ((None, None) for _ in batch)
            return
        masked = [
            row for row in batch if "mask" in self._groups and self._rows["mask_locator"][row]
        ]
        found = self._contents(masked, "mask_locator", "mask_picture")
        masks = dict(zip(masked, found, strict=True))
        contents = self._contents(batch, "locator", "picture")
        for row, content in zip(batch, contents, strict=True):
            try:
                yield self._decode(row, content), self._decode_mask(row, masks.get(row))
            except (InputError, OSError) as error:
                yield error

    def _decode(self, row: int, content: bytes | Exception) -> Image.Image:
        if isinstance(content, Exception):
            raise content
        name = self._rows["source"][row]
        return fit_picture(decode_picture(content, name, self._data.max_pixels), self._size)

    def _decode_mask(self, row: int, content: bytes | Exception | None) -> Image.Image | None:
        if content is None:
            return None
        if isinstance(content, Exception):
            raise content
        upright = (int(self._rows["width"][row]), int(self._rows["height"][row]))
        name = self._rows["source"][row]
        return fit_mask(decode_mask(content, name, upright, self._data.max_pixels), self._size)

    def _contents(
        self, batch: list[int], locator: str, picture: str
    ) -> Iterator[bytes | Exception]:
        """Files of rows, made sure to be those that were indexed."""
        files = open_pictures(self._data, [self._rows[locator][row] for row in batch])
        for row, content in zip(batch, files, strict=True):
            if isinstance(content, bytes) and digest_of(content) != self._rows[picture][row]:
                yield InputError(
                    f"'{self._rows['source'][row]}' was changed while the cache was built: build "
                    f"again"
                )
            else:
                yield content
