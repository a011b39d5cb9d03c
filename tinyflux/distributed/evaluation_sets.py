"""The sets of real pictures with captions that a student is measured against."""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tinyflux.cache.config import MixSource
from tinyflux.cache.dataset import CachedDataset
from tinyflux.data.mixture import CacheMixture
from tinyflux.distributed.picture_column import PictureColumn
from tinyflux.errors import InputError
from tinyflux.evaluation.config import HELD_OUT, EvaluateConfig, EvaluationSet
from tinyflux.storage.hub import pinned
from tinyflux.storage.remote import open_filesystem

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """A real picture of a set.

    Attributes:
        caption: Its caption.
        row: Its row, of the cache or of the set's file.
        key: What tells it from others: the cache's key, or the digest of its bytes and caption.
        height: In pixels.
        width: In pixels.
    """

    caption: str
    row: int
    key: str
    height: int
    width: int


@dataclass
class SetRows:
    """A set, listed.

    Attributes:
        name: The set's name.
        file: The Parquet file, or empty for the cache.
        image_key: The file's column of pictures.
        rows: Its pictures; those of one size are neighbours.
        labels: Values of the label columns.
        columns: Values of the columns that divide it.
        made_by: What made the cache's latents, which its keys do not tell.
    """

    name: str
    file: str
    image_key: str
    rows: list[Row]
    labels: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    made_by: str = ""


def list_sets(
    evaluate: EvaluateConfig, cache: str, val_fraction: float, downscale: int
) -> Iterator[SetRows]:
    """The sets that a run file asks for, in its order; a part of the cache without rows is none.

    Args:
        cache: its directory or URL.
        val_fraction: the share of it that is held out.
        downscale: pixels of a latent's side.

    Raises:
        TinyFluxError: a cache or a file that cannot be read, or pictures that cannot be drawn.
    """
    data = CacheMixture([MixSource(cache)])
    for name in evaluate.cache_sets:
        found = list_cache_set(name, data, val_fraction, evaluate.count, downscale)
        if found is None:
            logger.info("evaluate: the cache has no rows of '%s'", name)
        else:
            yield found
    for chosen in evaluate.sets:
        yield list_file_set(chosen, evaluate.count, downscale)


def list_cache_set(
    name: str, data: CacheMixture, val_fraction: float, count: int, downscale: int
) -> SetRows | None:
    """At most ``count`` rows of a part of a cache, evenly; None where it has none.

    Args:
        name: of the part, one of ``CACHE_SETS``.
        data: that cache alone.
    """
    held_out = data.held_out(val_fraction)
    chosen = np.flatnonzero(held_out if name == HELD_OUT else ~held_out)
    if not len(chosen):
        return None
    return _cache_rows(name, data.caches[0], _thinned(chosen, count), downscale)


def _thinned(rows: np.ndarray, count: int) -> list[int]:
    """At most ``count`` of the rows, evenly."""
    if len(rows) > count:
        rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    kept: list[int] = rows.tolist()
    return kept


def _cache_rows(name: str, data: CachedDataset, chosen: list[int], downscale: int) -> SetRows:
    captions, keys = data.captions(), data.keys()
    sides = {row: grid for grid, run in data.grids() for row in run}
    # Parts are of one size: so are neighbours.
    ordered = sorted(chosen, key=lambda row: (sides[row], row))
    rows = [
        Row(captions[row], row, keys[row], sides[row][0] * downscale, sides[row][1] * downscale)
        for row in ordered
    ]
    latents = data.manifest.recipe.groups.get("latents")
    return SetRows(name, "", "", rows, made_by=latents.fingerprint if latents else data.digest)


def list_file_set(chosen: EvaluationSet, count: int | None, downscale: int) -> SetRows:
    """At most ``count`` rows of the set of a Parquet file, evenly; None: all of them.

    Raises:
        InputError: no file, a column that it lacks, or a picture that the model cannot draw.
    """
    # On the Hub, the commit that is there now: what is read later is then the same.
    chosen = replace(chosen, file=pinned(chosen.file))
    names = [chosen.image_key, chosen.caption_key, *chosen.labels, *chosen.group_by]
    try:
        system, path = open_filesystem(chosen.file)
        there = pq.read_schema(path, filesystem=system).names
        if missing := [name for name in names if name not in there]:
            raise InputError(
                f"'{chosen.file}' has no column '{missing[0]}' (it has {', '.join(there)}): see "
                f"evaluate.sets, '{chosen.name}'"
            )
        table = pq.read_table(path, columns=sorted(set(names[1:])), filesystem=system)
        if not table.num_rows:
            raise InputError(f"the set '{chosen.name}' has no rows: '{chosen.file}' is empty")
        rows = _file_rows(chosen, table[chosen.caption_key], count, downscale)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the set '{chosen.name}' cannot be read from '{chosen.file}': {error!s:.200}"
        ) from error
    order = sorted(range(len(rows)), key=lambda at: (rows[at].height, rows[at].width, at))

    def values(names: Sequence[str]) -> dict[str, list[str]]:
        return {name: [str(table[name][rows[at].row].as_py()) for at in order] for name in names}

    return SetRows(
        chosen.name,
        chosen.file,
        chosen.image_key,
        [rows[at] for at in order],
        values(chosen.labels),
        values(chosen.group_by),
    )


def _file_rows(
    chosen: EvaluationSet, captions: pa.ChunkedArray, count: int | None, downscale: int
) -> list[Row]:
    indices = _thinned(np.arange(len(captions)), count or len(captions))
    contents = PictureColumn(chosen.file, chosen.image_key).read(indices)
    return [
        _file_row(content, captions[at].as_py(), at, chosen, downscale)
        for at, content in zip(indices, contents, strict=True)
    ]


def _file_row(
    content: bytes, caption: str, index: int, chosen: EvaluationSet, downscale: int
) -> Row:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
    except OSError as error:
        raise InputError(f"row {index} of '{chosen.file}' holds no picture") from error
    if not caption or not caption.strip():
        raise InputError(f"row {index} of '{chosen.file}' has no caption")
    if width % downscale or height % downscale:
        raise InputError(
            f"row {index} of '{chosen.file}' is {width}x{height}, and pictures are drawn in "
            f"multiples of {downscale}: resize the set's pictures"
        )
    key = hashlib.sha256(content + caption.encode()).hexdigest()
    return Row(caption, index, key, height, width)
