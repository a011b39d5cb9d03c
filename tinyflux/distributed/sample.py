"""Pictures for many prompts, one file each, drawn by a pool of Ray Data actors.

The prompts are cut into batches once, by their places in the list. A second run draws the batches
of which a picture is missing, the same way, so a job that was killed ends with the same files::

    00000.png ...      each with its settings inside
    metadata.jsonl     a line each: file_name, prompt, seed, settings
    grid.png           the first 64, if they have one size
"""

import dataclasses
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.prompt_file import read_prompts, sample_requests
from tinyflux.distributed.ray_session import ensure_ray, quiet_data
from tinyflux.distributed.relay import answer, value_of
from tinyflux.distributed.weights import load_student, student_config, weights_fingerprint
from tinyflux.errors import ConfigError
from tinyflux.inference.request import SampleRequest
from tinyflux.inference.sampler import Sampler
from tinyflux.model.config import ZooConfig
from tinyflux.model.text import CutTokens
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.device import resolve_device
from tinyflux.util.images import image_grid, png_bytes, read_picture

logger = logging.getLogger(__name__)

GRID = 64  # pictures of it


@dataclass
class Batch:
    """Pictures that are drawn together.

    Attributes:
        indices: Their places in the list of all pictures.
        requests: What each shows.
        missing: Those of the indices whose pictures are to be written.
    """

    indices: list[int]
    requests: list[SampleRequest]
    missing: list[int]


def sample_prompts(config: SampleConfig, zoo: ZooConfig) -> str:
    """Draw every prompt that has no picture yet, on Ray; where the pictures are.

    Raises:
        TinyFluxError: prompts, models or settings that cannot work.
    """
    if config.checkpoint is None or config.output_dir is None:
        raise ConfigError("sample.checkpoint and sample.output_dir must be set")
    lines = read_prompts(config.prompts, config.prompts_file)
    output = open_folder(config.output_dir)
    models = dataclasses.replace(zoo, device="cpu").build(student_config(config.checkpoint))
    requests = sample_requests(lines, config, models.downscale)
    notes = PictureNotes(weights_fingerprint(config.checkpoint), models.downscale)
    cuts = models.cut_tokens([request.prompt for request in requests])
    batches = list(_batches(config.batch_size, requests, notes, output))
    total, left = len(requests), sum(len(batch.missing) for batch in batches)
    logger.info(f"sample: {total - left} of {total} are there")
    _draw(config, zoo, notes, batches, total)
    _write_metadata(output, requests, cuts, notes)
    _write_grid(output, requests)
    if longer := sum(map(any, cuts)):
        logger.info(
            f"sample: {longer} of {total} prompts are longer than the text encoders read; "
            "metadata.jsonl says what was left out"
        )
    logger.info(f"sample: {total} pictures in {config.output_dir}")
    return config.output_dir


@dataclass(frozen=True)
class PictureNotes:
    """What is written into pictures: all that they depend on, so that the same is not drawn again.

    Attributes:
        weights: The fingerprint of the student's weights.
        downscale: Pixels of a latent's side.
    """

    weights: str
    downscale: int

    def of(self, request: SampleRequest) -> str:
        """A request's note, as JSON; sides are in latents, as they were in the first pictures."""
        height, width = self.latents(request)
        note = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_steps": request.num_steps,
            "guidance_scale": request.guidance_scale,
            "height": height,
            "width": width,
            "seed": request.seed,
            "weights": self.weights,
        }
        return json.dumps(note, sort_keys=True)

    def latents(self, request: SampleRequest) -> tuple[int, int]:
        """A picture's height and width in latents."""
        return request.height // self.downscale, request.width // self.downscale


def _batches(
    batch_size: int, requests: list[SampleRequest], notes: PictureNotes, output: Folder
) -> Iterator[Batch]:
    """The batches of which something is missing."""
    alike: dict[SampleRequest, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(dataclasses.replace(request, prompt="", seed=0), []).append(index)
    there = output.list()

    def is_missing(index: int) -> bool:
        name = _file_name(index)
        return name not in there or _note_in(output.read(name)) != notes.of(requests[index])

    for indices in alike.values():
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            if missing := [index for index in part if is_missing(index)]:
                yield Batch(part, [requests[index] for index in part], missing)


def _draw(
    config: SampleConfig, zoo: ZooConfig, notes: PictureNotes, batches: list[Batch], total: int
) -> None:
    """Draw the batches on Ray and say how far it is; ``total`` counts what is there, too."""
    left = sum(len(batch.missing) for batch in batches)
    done, started = total - left, time.monotonic()
    for count in _drawn(config, zoo, notes, batches):
        done += count
        rate = (done - total + left) / max(time.monotonic() - started, 1e-9)
        logger.info(
            f"sample: {done}/{total} pictures  {rate:.2f} pictures/s  "
            f"{(total - done) / rate:.0f} s left"
        )


def _drawn(
    config: SampleConfig, zoo: ZooConfig, notes: PictureNotes, batches: list[Batch]
) -> Iterator[int]:
    """How many pictures each batch was, as they are done."""
    if not batches:
        return
    ensure_ray()
    import ray

    quiet_data()
    rows = [{"batch": json.dumps(to_dict(batch))} for batch in batches]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        SampleActor,
        fn_constructor_args=[to_dict(config), to_dict(zoo), to_dict(notes)],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(rows))),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for answered in answers.iter_rows():
        yield value_of(answered)


class SampleActor:
    """An actor that holds the student and the frozen models, which the first batch loads."""

    def __init__(self, config: dict[str, Any], zoo: dict[str, Any], notes: dict[str, Any]):
        self._config = from_dict(SampleConfig, config, "the sample config")
        self._zoo = from_dict(ZooConfig, zoo, "the zoo config")
        self._notes = from_dict(PictureNotes, notes, "the pictures' notes")
        self._sampler: Sampler | None = None
        self._output = open_folder(str(self._config.output_dir))

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        return answer(lambda: self._draw(str(rows["batch"][0])), "a picture cannot be written")

    def _draw(self, packed: str) -> int:
        batch = from_dict(Batch, json.loads(packed), "a batch")
        if self._sampler is None:
            self._sampler = self._load_sampler()
        first = batch.requests[0]
        height, width = self._notes.latents(first)
        images = self._sampler.generate(
            [request.prompt for request in batch.requests],
            num_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            height=height,
            width=width,
            seed=[request.seed for request in batch.requests],
            negative_prompt=first.negative_prompt,
            solver=first.solver,
        )
        for index, request, image in zip(batch.indices, batch.requests, images, strict=True):
            if index in batch.missing:
                info = PngInfo()
                info.add_text("tinyflux", self._notes.of(request))
                self._output.write(_file_name(index), png_bytes(image, info))
        return len(batch.missing)

    def _load_sampler(self) -> Sampler:
        model = load_student(str(self._config.checkpoint), "cpu", torch.float32)
        zoo = self._zoo.build(model.config)
        device = resolve_device(self._zoo.device)
        return Sampler(zoo, model, device=device, dtype=self._zoo.dtype)


def _write_metadata(
    output: Folder, requests: list[SampleRequest], cuts: list[CutTokens], notes: PictureNotes
) -> None:
    """A line for each picture: its note, and what the text encoders did not read of its prompt."""
    lines = []
    for index, (request, cut) in enumerate(zip(requests, cuts, strict=True)):
        line = {"file_name": _file_name(index), **json.loads(notes.of(request))}
        if any(cut):
            line["prompt_truncated"] = cut._asdict()
        lines.append(json.dumps(line) + "\n")
    output.write("metadata.jsonl", "".join(lines).encode())


def _write_grid(output: Folder, requests: list[SampleRequest]) -> None:
    """The first pictures as one, if they have one size."""
    first = requests[:GRID]
    if len({(request.height, request.width) for request in first}) == 1:
        pictures = [read_picture(output.read(_file_name(index))) for index in range(len(first))]
        output.write("grid.png", png_bytes(image_grid(torch.stack(pictures))))


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _note_in(png: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(png)) as image:
            note: str | None = image.info.get("tinyflux")
            return note
    except (OSError, ValueError):
        return None
