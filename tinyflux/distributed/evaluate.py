"""Pictures drawn for sets of captions and measured against real ones, by Ray Data actors.

A set is cut into parts once, by its rows' places. An actor makes the features of a part's drawn or
real pictures, so a job that was killed, or is given again, makes only what is missing.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.evaluation_parts import (
    FOLDER,
    Part,
    RealPictures,
    draw_settings,
    drawn_parts,
    read_features,
    real_parts,
    write_features,
)
from tinyflux.distributed.evaluation_sets import (
    SetRows,
    list_file_set,
    list_sets,
)
from tinyflux.distributed.picture_column import PictureColumn
from tinyflux.distributed.ray_session import ensure_ray, quiet_data
from tinyflux.distributed.relay import answer, value_of
from tinyflux.distributed.weights import load_student, student_config, weights_fingerprint
from tinyflux.evaluation.config import EvaluateConfig
from tinyflux.evaluation.drawing import draw, features_of
from tinyflux.evaluation.extractors import FeatureExtractor, open_extractor
from tinyflux.evaluation.figures import Pictures, figures, grouped
from tinyflux.evaluation.neighbours import TrainedOn
from tinyflux.evaluation.record import DrawnPicture, Measured, SetFigures
from tinyflux.inference.sampler import Sampler
from tinyflux.model.config import ZooConfig
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.device import resolve_device
from tinyflux.util.images import png_bytes, read_picture

logger = logging.getLogger(__name__)


@dataclass
class Task:
    """Features to make.

    Attributes:
        part: Of which pictures.
        extractors: Names of those whose features are missing.
    """

    part: Part
    extractors: list[str]


@dataclass
class Job:
    """What an actor needs to know.

    Attributes:
        sample: The run's section, with the checkpoint to measure.
        zoo: The run's section.
        cache: The cache's directory or URL.
        output: The run's directory or URL.
        latent_shift: Of the model that the cache was made for.
    """

    sample: SampleConfig
    zoo: ZooConfig
    cache: str
    output: str
    latent_shift: float

    def folder(self, part: Part) -> Folder:
        """Where a part's features are kept."""
        return open_folder(self.cache if part.seed is None else self.output)


@dataclass
class _Parts:
    """A set's parts: of its real pictures, and of the drawn ones by turn, if any are drawn."""

    chosen: SetRows
    real: list[Part]
    drawn: list[list[Part]]


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
    checkpoint = str(sample.checkpoint)
    model, weights = student_config(checkpoint), weights_fingerprint(checkpoint)
    downscale = dataclasses.replace(zoo, device="cpu").build(model).downscale
    extractors = [open_extractor(name) for name in evaluate.extractors]
    job = Job(sample, zoo, cache, output, model.latent_shift)
    sets = [
        _Parts(
            chosen,
            real_parts(chosen, zoo, model.latent_shift),
            [drawn_parts(chosen, sample, weights, turn) for turn in range(evaluate.seeds)],
        )
        for chosen in list_sets(evaluate, cache, val_fraction, downscale)
    ]
    trained = None
    if evaluate.trained_on is not None:
        chosen = list_file_set(evaluate.trained_on, None, downscale)
        trained = _Parts(chosen, real_parts(chosen, zoo, model.latent_shift), [])
    real = [part for one in (*sets, *([trained] if trained else ())) for part in one.real]
    drawn = [part for one in sets for parts in one.drawn for part in parts]
    _make(job, [*_missing(job, real, extractors, "real"),
                *_missing(job, drawn, extractors, "drawn")])  # fmt: skip
    measured = Measured(weights, sample.num_steps, sample.guidance_scale, evaluate.seeds)
    for one in sets:
        measured.sets.append(_figures(job, evaluate, one, trained, extractors))
    return measured


def _missing(
    job: Job, parts: Sequence[Part], extractors: Sequence[FeatureExtractor], what: str
) -> list[Task]:
    """What is to be made of the parts, which are all real or all drawn."""
    if not parts:
        return []
    there = set(job.folder(parts[0]).list(FOLDER))
    tasks = [
        Task(part, [one.name for one in extractors if part.path(one.fingerprint) not in there])
        for part in parts
    ]
    missing = [task for task in tasks if task.extractors]
    total, left = _count(tasks), _count(missing)
    logger.info("evaluate: features of %d of %d %s pictures are there", total - left, total, what)
    return missing


def _count(tasks: Sequence[Task]) -> int:
    return sum(len(task.part.rows) for task in tasks)


def _make(job: Job, tasks: Sequence[Task]) -> None:
    """Have actors make the features."""
    if not tasks:
        return
    ensure_ray()
    import ray

    quiet_data()
    sample = job.sample
    rows = [{"task": json.dumps(to_dict(task))} for task in tasks]
    answers = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096)).map_batches(
        EvaluateActor,
        fn_constructor_args=[to_dict(job)],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(sample.num_actors, len(rows))),
        num_cpus=sample.cpus_per_actor,
        num_gpus=sample.gpus_per_actor or None,
    )
    total, done, started = _count(tasks), 0, time.monotonic()
    for answered in answers.iter_rows():
        done += value_of(answered)
        rate = done / max(time.monotonic() - started, 1e-9)
        logger.info("evaluate: %d/%d pictures  %.2f pictures/s", done, total, rate)


class EvaluateActor:
    """An actor that holds the student, the frozen models and the extractors once it needs them."""

    def __init__(self, job: dict[str, Any]):
        self._job = from_dict(Job, job, "the evaluation")
        self._device = resolve_device(self._job.zoo.device)
        self._zoo = self._job.zoo.build(student_config(str(self._job.sample.checkpoint)))
        self._real = RealPictures(self._job.cache, self._zoo, self._job.latent_shift)
        self._sampler: Sampler | None = None
        self._extractors: dict[str, FeatureExtractor] = {}

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        return answer(lambda: self._make(str(rows["task"][0])), "features cannot be written")

    def _make(self, packed: str) -> int:
        task = from_dict(Task, json.loads(packed), "a task")
        part = task.part
        for name in task.extractors:
            if name not in self._extractors:
                self._extractors[name] = open_extractor(name, self._device)
        pictures = self._real.of(part) if part.seed is None else self._drawn(part)
        extractors = [self._extractors[name] for name in task.extractors]
        write_features(self._job.folder(part), part, features_of(extractors, pictures))
        return len(part.rows)

    def _drawn(self, part: Part) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1], of the part's captions."""
        if self._sampler is None:
            model = load_student(str(self._job.sample.checkpoint), "cpu", torch.float32)
            self._sampler = Sampler(self._zoo, model, device=self._device, dtype=self._zoo.dtype)
        settings = draw_settings(self._job.sample)
        pictures = draw(self._sampler, part.drawn(self._zoo.downscale), settings)
        if part.kept:
            output = open_folder(self._job.output)
            for index, picture in enumerate(pictures, start=part.first):
                output.write(part.kept_file(index), png_bytes(picture))
        return pictures


def _figures(
    job: Job,
    evaluate: EvaluateConfig,
    parts: _Parts,
    trained: _Parts | None,
    extractors: Sequence[FeatureExtractor],
) -> SetFigures:
    """A set's figures from the files of its parts, and of the training pictures'."""
    rows, cache, output = parts.chosen, open_folder(job.cache), open_folder(job.output)
    drawn = [part for turn in parts.drawn for part in turn]
    pictures = [
        Pictures(
            read_features(cache, parts.real, one.fingerprint),
            read_features(output, drawn, one.fingerprint),
            [row.caption for row in rows.rows],
            rows.labels,
            None
            if trained is None
            else TrainedOn(
                read_features(cache, trained.real, one.fingerprint), trained.chosen.labels
            ),
        )
        for one in extractors
    ]
    among = evaluate.retrieval_among
    spaces = [figures(one, part, among) for one, part in zip(extractors, pictures, strict=True)]
    for space in spaces:
        told = (f"{name} {made.value:.4g}" for name, made in space.figures.items())
        logger.info("%s, by %s: %s", rows.name, space.extractor, "  ".join(told))
    columns = {**rows.columns, "size": [f"{row.width}x{row.height}" for row in rows.rows]}
    groups = grouped(extractors, pictures, columns, evaluate.smallest_group, among)
    count = len(rows.rows)
    kept = list(_keep_real(output, parts))
    return SetFigures(rows.name, count, count * evaluate.seeds, spaces, groups, kept)


def _keep_real(output: Folder, parts: _Parts) -> Iterator[DrawnPicture]:
    """The drawn pictures that are kept, a file's real pictures beside them."""
    chosen, drawn = parts.chosen, parts.drawn[0] if parts.drawn else []
    kept = [
        (part.kept_file(index), row)
        for part in drawn
        for index, row in enumerate(part.rows if part.kept else (), start=part.first)
    ]
    if chosen.file:
        contents = PictureColumn(chosen.file, chosen.image_key).read([row.row for _, row in kept])
        for (place, _), content in zip(kept, contents, strict=True):
            output.write(_real_beside(place), png_bytes(read_picture(content)))
    for place, row in kept:
        yield DrawnPicture(row.caption, place, _real_beside(place) if chosen.file else "")


def _real_beside(drawn: str) -> str:
    """The place of the real picture of a drawn one."""
    return drawn.removesuffix(".png") + ".data.png"
