"""Parts of a set, whose features are made at once and kept in files of their own.

A file is named by all that its features follow from, the pictures and the extractor, so what is
there need not be made again. Features of real pictures lie in the cache's ``evaluation`` folder,
for every run that is measured against them, those of drawn ones in the run's.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tinyflux.cache.dataset import CachedDataset
from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.evaluation_sets import Row, SetRows
from tinyflux.distributed.picture_column import PictureColumn
from tinyflux.evaluation.drawing import DrawBatch, DrawSettings, as_stored
from tinyflux.inference.sampler import decode
from tinyflux.model.config import ZooConfig
from tinyflux.model.zoo import ModelZoo
from tinyflux.run_dir import EVALUATION_PICTURES
from tinyflux.storage.folder import Folder
from tinyflux.util.config import dtype_name
from tinyflux.util.images import read_picture

FOLDER = EVALUATION_PICTURES  # in the run's directory, and of the same name in the cache's
PICTURES_KEPT = 64  # of each set, drawn from the first seed, to be looked at
REAL_ROWS = 32  # of a part of real pictures, whatever is drawn at once
FEATURES = "features"  # the tensor's name in a file


@dataclass
class Part:
    """Pictures of one size.

    Attributes:
        content: Digest of all that they follow from.
        file: As of :class:`SetRows`.
        image_key: As of :class:`SetRows`.
        rows: The real pictures, or those whose captions are drawn.
        seed: Seeds begin with it; None is the real pictures.
        first: The place of the part's first picture in its set.
        kept: Folder of drawn pictures, in the run's; empty keeps none.
    """

    content: str
    file: str
    image_key: str
    rows: list[Row]
    seed: int | None
    first: int
    kept: str = ""

    def path(self, extractor: str) -> str:
        """Of the file of its features, by an extractor's fingerprint."""
        by = hashlib.sha256(extractor.encode()).hexdigest()[:12]
        return f"{FOLDER}/{self.content}.{by}.safetensors"

    def kept_file(self, index: int) -> str:
        """Of the drawn picture at this place of the set, in the run's directory.

        Named by all that it follows from, as features are: what other weights drew stays beside it.
        """
        return f"{self.kept}/{index:05d}.{self.content[:12]}.png"

    def drawn(self, downscale: int) -> DrawBatch:
        """What is drawn of it."""
        first = self.rows[0]
        grid = first.height // downscale, first.width // downscale
        return DrawBatch([row.caption for row in self.rows], grid, self.seed or 0)


def real_parts(chosen: SetRows, zoo: ZooConfig, latent_shift: float) -> list[Part]:
    """The parts of a set's real pictures.

    Args:
        zoo: whose VAE decodes the cache's latents.
        latent_shift: of the model that the cache was made for.
    """
    made_by = None
    if not chosen.file:
        made_by = [chosen.made_by, zoo.vae_repo, dtype_name(zoo.dtype), latent_shift]
    return [
        Part(_digest([[row.key for row in rows], made_by]), chosen.file, chosen.image_key, rows,
             None, start)
        for start, rows in _cut(chosen.rows, REAL_ROWS)
    ]  # fmt: skip


def drawn_parts(chosen: SetRows, sample: SampleConfig, weights: str, turn: int) -> list[Part]:
    """The parts of a set's drawn pictures.

    Args:
        sample: how they are drawn, and how many at once.
        weights: the student's fingerprint.
        turn: which picture of each caption, from 0.
    """
    seed, parts = sample.seed + turn * len(chosen.rows), []
    for start, rows in _cut(chosen.rows, sample.batch_size):
        captions = [[row.caption, row.height, row.width] for row in rows]
        how = [sample.num_steps, sample.guidance_scale, sample.negative_prompt]
        kept = f"{FOLDER}/{chosen.name}" if turn == 0 and start < PICTURES_KEPT else ""
        content = _digest([chosen.name, captions, weights, seed + start, how])
        parts.append(Part(content, "", "", rows, seed + start, start, kept))
    return parts


def draw_settings(sample: SampleConfig) -> DrawSettings:
    """How a run's section ``sample`` has pictures drawn."""
    return DrawSettings(sample.num_steps, sample.guidance_scale, sample.negative_prompt)


def _cut(rows: Sequence[Row], most: int) -> Iterator[tuple[int, list[Row]]]:
    """Neighbours of one size, ``most`` at once, with the place of the first."""
    start = 0
    while start < len(rows):
        size = (rows[start].height, rows[start].width)
        part = [row for row in rows[start : start + most] if (row.height, row.width) == size]
        yield start, part
        start += len(part)


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def write_features(folder: Folder, part: Part, features: dict[str, Tensor]) -> None:
    """Keep a part's features, by extractor's fingerprint."""
    for extractor, values in features.items():
        folder.write(part.path(extractor), save({FEATURES: values}))


def has_features(folder: Folder, part: Part, extractor: str) -> bool:
    """Whether a part's features are there, by an extractor's fingerprint."""
    return folder.size(part.path(extractor)) is not None


def read_features(folder: Folder, parts: Sequence[Part], extractor: str) -> Tensor:
    """``[N, D]``: the features of several parts that are there, one behind the other."""
    return torch.cat([load(folder.read(part.path(extractor)))[FEATURES] for part in parts])


class RealPictures:
    """Real pictures of parts; what one part had to open stays open for the next.

    Args:
        cache: its directory or URL.
        zoo: decodes the cache's latents.
        latent_shift: of the model that the cache was made for.
    """

    def __init__(self, cache: str, zoo: ModelZoo, latent_shift: float):
        self._place, self._zoo, self._shift = cache, zoo, latent_shift
        self._cache: CachedDataset | None = None
        self._column: tuple[tuple[str, str], PictureColumn] | None = None

    def of(self, part: Part) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1]: the file's pictures, or the cache's latents, decoded."""
        if part.file:
            place = part.file, part.image_key
            if self._column is None or self._column[0] != place:
                self._column = place, PictureColumn(*place)
            contents = self._column[1].read([row.row for row in part.rows])
            return torch.stack([read_picture(content) for content in contents])
        if self._cache is None:
            self._cache = CachedDataset(self._place, check_files=False)
        rows = [row.row for row in part.rows]
        latents = self._cache.read(rows, groups=("latents",))["latents"]
        return as_stored(decode(self._zoo, latents, self._shift).cpu())
