"""Pictures drawn for sets of captions and measured against real ones, by Ray Data actors.

A set is cut into parts once, by its rows' places. An actor makes the features of a part's drawn or
real pictures and writes them as one file, named by all that they depend on, so a job that was
killed, or is given again, makes only what is missing. Features of the cache's real pictures stay in
the cache's ``evaluation`` folder, for every run that is measured against them; all others in the
run's.
"""

import dataclasses
import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from tinyflux.cache.config import MixSource
from tinyflux.cache.dataset import CachedDataset
from tinyflux.data.mixture import CacheMixture
from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.ray_session import ensure_ray, quiet_data
from tinyflux.distributed.relay import answer, value_of
from tinyflux.distributed.sample import read_picture, weights_fingerprint
from tinyflux.distributed.weights import load_student
from tinyflux.errors import InputError
from tinyflux.evaluation.config import EvaluateConfig, EvaluationSet
from tinyflux.evaluation.extractors import FeatureExtractor, open_extractor
from tinyflux.evaluation.figures import Pictures, figures, grouped
from tinyflux.evaluation.record import Measured, SetFigures
from tinyflux.inference.sampler import Sampler, decode
from tinyflux.model.config import ZooConfig
from tinyflux.run_dir import EVALUATION_PICTURES
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_filesystem, open_folder
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.device import resolve_device
from tinyflux.util.images import png_bytes

FOLDER = EVALUATION_PICTURES  # in the run's directory, and of the same name in the cache's
PICTURES_KEPT = 64  # of each set, drawn from the first seed, to be looked at

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
        rows: Its pictures.
        labels: Values of the label columns.
        columns: Values of the columns that divide it.
    """

    name: str
    file: str
    image_key: str
    rows: list[Row]
    labels: dict[str, list[str]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Part:
    """Features to make.

    Attributes:
        name: Of its file.
        file: As of :class:`SetRows`.
        image_key: As of :class:`SetRows`.
        rows: Pictures of one size.
        seed: Seeds begin with it; None makes features of the real pictures.
        first: The place of the part's first picture in its set.
        kept: Folder of drawn pictures, in the run's; empty keeps none.
    """

    name: str
    file: str
    image_key: str
    rows: list[Row]
    seed: int | None
    first: int
    kept: str = ""


@dataclass
class Job:
    """What an actor needs to know.

    Attributes:
        evaluate: The run's section.
        sample: The run's section, with the checkpoint to measure.
        zoo: The run's section.
        cache: The cache's directory or URL.
        output: The run's directory or URL.
        latent_shift: Of the model that the cache was made for.
    """

    evaluate: EvaluateConfig
    sample: SampleConfig
    zoo: ZooConfig
    cache: str
    output: str
    latent_shift: float

    def folder(self, part: Part) -> Folder:
        """Where a part's features are kept."""
        of_cache = part.seed is None and not part.file
        return open_folder(self.cache if of_cache else self.output)


def measure(
    evaluate: EvaluateConfig,
    sample: SampleConfig,
    zoo: ZooConfig,
    cache: str,
    val_fraction: float,
    output: str,
) -> Measured:
    """Draw, extract and measure on Ray what is not there yet; the figures.

    Args:
        sample: steps, guidance, seed, batches and actors; its checkpoint is measured.
        cache: the training data's directory or URL.
        val_fraction: the share of it that is held out.
        output: the run's directory or URL.

    Raises:
        TinyFluxError: sets, models or settings that cannot work.
    """
    student = load_student(str(sample.checkpoint), "cpu", torch.float32)
    weights, shift = weights_fingerprint(student), student.config.latent_shift
    downscale = dataclasses.replace(zoo, device="cpu").build(student.config).downscale
    extractors = [open_extractor(name) for name in evaluate.extractors]
    sets = list(_list_sets(evaluate, cache, val_fraction, downscale))
    job = Job(evaluate, sample, zoo, cache, output, shift)
    prints = [extractor.fingerprint for extractor in extractors]
    parts = {
        rows.name: [
            list(_parts(rows, job, None, prints, "")),
            *(
                list(_parts(rows, job, sample.seed + seed * len(rows.rows), prints, weights))
                for seed in range(evaluate.seeds)
            ),
        ]
        for rows in sets
    }
    _make(job, [part for groups in parts.values() for group in groups for part in group])
    measured = Measured(weights, sample.num_steps, sample.guidance_scale, evaluate.seeds)
    for rows in sets:
        measured.sets.append(_figures(job, rows, parts[rows.name], extractors))
    return measured


def _list_sets(
    evaluate: EvaluateConfig, cache: str, val_fraction: float, downscale: int
) -> Iterator[SetRows]:
    data = CacheMixture([MixSource(cache)])
    held_out = data.held_out(val_fraction)
    for name in evaluate.cache_sets:
        chosen = np.flatnonzero(held_out if name == "held_out" else ~held_out)
        if not len(chosen):
            logger.info("evaluate: the cache has no rows of '%s'", name)
            continue
        yield _cache_rows(name, data.caches[0], _thinned(chosen, evaluate.count), downscale)
    for chosen_set in evaluate.sets:
        yield _file_rows(chosen_set, evaluate.count, downscale)


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
    return SetRows(name, "", "", rows)


def _file_rows(chosen: EvaluationSet, count: int, downscale: int) -> SetRows:
    """The set of a Parquet file.

    Raises:
        InputError: no file, a column that it lacks, or a picture that the model cannot draw.
    """
    names = [chosen.image_key, chosen.caption_key, *chosen.labels, *chosen.group_by]
    try:
        system, path = open_filesystem(chosen.file)
        there = pq.read_schema(path, filesystem=system).names
        if missing := [name for name in names if name not in there]:
            raise InputError(
                f"'{chosen.file}' has no column '{missing[0]}' (it has {', '.join(there)}): see "
                f"evaluate.sets, '{chosen.name}'"
            )
        table = pq.read_table(path, columns=sorted(set(names)), filesystem=system)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the set '{chosen.name}' cannot be read from '{chosen.file}': {error!s:.200}"
        ) from error
    if not table.num_rows:
        raise InputError(f"the set '{chosen.name}' has no rows: '{chosen.file}' is empty")
    indices = _thinned(np.arange(table.num_rows), count)
    rows = [
        _file_row(_bytes(table[chosen.image_key][index]), table[chosen.caption_key][index].as_py(),
                  index, chosen, downscale)
        for index in indices
    ]  # fmt: skip
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


def _bytes(cell: Any) -> bytes:
    value = cell.as_py()
    content: bytes = value["bytes"] if isinstance(value, dict) else value
    return content


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


def _parts(
    rows: SetRows, job: Job, seed: int | None, prints: list[str], weights: str
) -> Iterator[Part]:
    """A set's parts, each of one size, named by all that its features depend on."""
    sample, start = job.sample, 0
    while start < len(rows.rows):
        size = (rows.rows[start].height, rows.rows[start].width)
        part = [row for row in rows.rows[start : start + sample.batch_size]
                if (row.height, row.width) == size]  # fmt: skip
        first = None if seed is None else seed + start
        on: dict[str, Any] = {"keys": [row.key for row in part], "extractors": prints}
        if first is not None:
            on |= {
                "weights": weights, "seed": first, "steps": sample.num_steps, "size": size,
                "guidance": sample.guidance_scale, "negative": sample.negative_prompt,
            }  # fmt: skip
        name = hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:32]
        kept = f"{FOLDER}/{rows.name}" if seed == sample.seed and start < PICTURES_KEPT else ""
        yield Part(
            f"{FOLDER}/{name}.safetensors", rows.file, rows.image_key, part, first, start, kept
        )
        start += len(part)


def _make(job: Job, parts: list[Part]) -> None:
    """Have actors make the parts that are missing."""
    places = {folder: set(open_folder(folder).list(FOLDER)) for folder in {job.cache, job.output}}
    missing = [part for part in parts if part.name not in places[job.folder(part).location]]
    total, left = sum(len(part.rows) for part in parts), sum(len(part.rows) for part in missing)
    logger.info("evaluate: features of %d of %d pictures are there", total - left, total)
    if not missing:
        return
    ensure_ray()
    import ray

    quiet_data()
    sample = job.sample
    rows = [{"part": json.dumps(to_dict(part))} for part in missing]
    answers = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096)).map_batches(
        EvaluateActor,
        fn_constructor_args=[to_dict(job)],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(sample.num_actors, len(rows))),
        num_cpus=sample.cpus_per_actor,
        num_gpus=sample.gpus_per_actor or None,
    )
    done, started = total - left, time.monotonic()
    for answered in answers.iter_rows():
        done += value_of(answered)
        rate = (done - total + left) / max(time.monotonic() - started, 1e-9)
        logger.info("evaluate: %d/%d pictures  %.2f pictures/s", done, total, rate)


class EvaluateActor:
    """An actor that holds the student, the frozen models and the extractors once it needs them."""

    def __init__(self, job: dict[str, Any]):
        self._job = from_dict(Job, job, "the evaluation")
        self._device = resolve_device(self._job.zoo.device)
        self._sampler: Sampler | None = None
        self._cache: CachedDataset | None = None
        self._column: tuple[tuple[str, str], pa.ChunkedArray] | None = None
        self._extractors: list[FeatureExtractor] = []

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        return answer(lambda: self._make(str(rows["part"][0])), "features cannot be written")

    def _make(self, packed: str) -> int:
        part = from_dict(Part, json.loads(packed), "a part")
        if self._sampler is None:
            self._sampler = self._load_sampler()
            names = self._job.evaluate.extractors
            self._extractors = [open_extractor(name, self._device) for name in names]
        pictures = self._real(part) if part.seed is None else self._drawn(self._sampler, part)
        features = {one.fingerprint: one(pictures * 2 - 1) for one in self._extractors}
        self._job.folder(part).write(part.name, save(features))
        return len(part.rows)

    def _load_sampler(self) -> Sampler:
        model = load_student(str(self._job.sample.checkpoint), "cpu", torch.float32)
        zoo = self._job.zoo.build(model.config)
        return Sampler(zoo, model, device=self._device, dtype=self._job.zoo.dtype)

    def _drawn(self, sampler: Sampler, part: Part) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1], of the part's captions."""
        sample, downscale, first = self._job.sample, sampler.zoo.downscale, part.rows[0]
        pictures = sampler.generate(
            [row.caption for row in part.rows],
            num_steps=sample.num_steps,
            guidance_scale=sample.guidance_scale,
            height=first.height // downscale,
            width=first.width // downscale,
            seed=part.seed,
            negative_prompt=sample.negative_prompt,
        ).cpu()
        if part.kept:
            output = open_folder(self._job.output)
            for index, picture in enumerate(pictures, start=part.first):
                output.write(f"{part.kept}/{index:05d}.png", png_bytes(picture))
        # As a file holds them: real pictures are whole numbers, too.
        return (pictures * 255).round() / 255

    def _real(self, part: Part) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1]: the file's pictures, or the cache's latents, decoded."""
        if not part.file:
            assert self._sampler is not None
            if self._cache is None:
                self._cache = CachedDataset(self._job.cache, check_files=False)
            latents = self._cache.read([row.row for row in part.rows], groups=("latents",))[
                "latents"
            ]
            decoded = decode(self._sampler.zoo, latents, self._job.latent_shift).cpu()
            return (decoded * 255).round() / 255
        column = self._pictures_of(part.file, part.image_key)
        return torch.stack([read_picture(_bytes(column[row.row])) for row in part.rows])

    def _pictures_of(self, file: str, key: str) -> pa.ChunkedArray:
        """A file's column of pictures, kept for the file's other parts."""
        if self._column is None or self._column[0] != (file, key):
            system, path = open_filesystem(file)
            self._column = (file, key), pq.read_table(path, columns=[key], filesystem=system)[key]
        return self._column[1]


def _figures(
    job: Job, rows: SetRows, parts: list[list[Part]], extractors: list[FeatureExtractor]
) -> SetFigures:
    """A set's figures from the files of its parts: the real ones first, then those of each seed."""
    stored = [[load(job.folder(part).read(part.name)) for part in group] for group in parts]
    captions, labels = [row.caption for row in rows.rows], rows.labels
    pictures = [
        Pictures(
            torch.cat([part[one.fingerprint] for part in stored[0]]),
            torch.cat([part[one.fingerprint] for group in stored[1:] for part in group]),
            captions,
            labels,
        )
        for one in extractors
    ]
    among = job.evaluate.retrieval_among
    spaces = [figures(one, part, among) for one, part in zip(extractors, pictures, strict=True)]
    for space in spaces:
        told = (f"{name} {made.value:.4g}" for name, made in space.figures.items())
        logger.info("%s, by %s: %s", rows.name, space.extractor, "  ".join(told))
    columns = {**rows.columns, "size": [f"{row.width}x{row.height}" for row in rows.rows]}
    groups = grouped(extractors, pictures, columns, job.evaluate.smallest_group, among)
    drawn = len(rows.rows) * job.evaluate.seeds
    return SetFigures(rows.name, len(rows.rows), drawn, spaces, groups)
