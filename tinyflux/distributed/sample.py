"""Pictures for many prompts, one file each, drawn by a pool of Ray Data actors.

The prompts are cut into batches once, by their places in the list. A second run draws the batches
of which a picture is missing, the same way, so a job that was killed ends with the same files::

    00000.png ...      each with its settings inside
    metadata.jsonl     a line each: file_name, prompt, seed, settings
    grid.png           the first 64, if they have one size
"""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tinyflux.distributed.config import SampleConfig
from tinyflux.distributed.prompt_file import Wish, read_wishes
from tinyflux.distributed.ray_session import ensure_ray, quiet_data
from tinyflux.distributed.relay import answer, value_of
from tinyflux.distributed.weights import load_student
from tinyflux.errors import ConfigError
from tinyflux.inference.sampler import Sampler
from tinyflux.model.config import ZooConfig
from tinyflux.model.text import CutTokens
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.device import resolve_device
from tinyflux.util.images import image_grid, png_bytes

GRID = 64  # pictures of it


@dataclass
class Batch:
    """Pictures that are drawn together.

    Attributes:
        places: of the wishes in the list. missing: those of them that are to be written.
    """

    places: list[int]
    wishes: list[Wish]
    missing: list[int]


def wanted_pictures(config: SampleConfig) -> list[Wish]:
    """Every picture that ``config`` asks for.

    Raises:
        InputError: there are none, or one that cannot be drawn.
    """
    names = {item.name for item in dataclasses.fields(Wish)} - {"prompt"}
    defaults = {name: getattr(config, name) for name in names}
    return read_wishes(config.prompts, config.prompts_file, defaults)


def sample_prompts(config: SampleConfig, zoo: ZooConfig) -> str:
    """Draw every prompt that has no picture yet, on Ray; where the pictures are.

    Raises:
        TinyFluxError: prompts, models or settings that cannot work.
    """
    if config.checkpoint is None or config.output_dir is None:
        raise ConfigError("sample.checkpoint and sample.output_dir must be set")
    wishes, output = wanted_pictures(config), open_folder(config.output_dir)
    student = load_student(config.checkpoint, "cpu", torch.float32)
    weights = _fingerprint(student)
    models = dataclasses.replace(zoo, device="cpu").build(student.config)
    cuts = models.cut_tokens([wish.prompt for wish in wishes])
    batches = list(_batches(config, wishes, weights, output))
    total, left = len(wishes), sum(len(batch.missing) for batch in batches)
    print(f"sample: {total - left} of {total} are there", flush=True)
    done, started = total - left, time.monotonic()
    for count in _draw(config, zoo, weights, batches):
        done += count
        rate = (done - total + left) / max(time.monotonic() - started, 1e-9)
        print(
            f"sample: {done}/{total} pictures  {rate:.2f} pictures/s  "
            f"{(total - done) / rate:.0f} s left",
            flush=True,
        )
    lines = [
        json.dumps(
            {"file_name": _name(place), **json.loads(_settings(wish, weights)), **_told(cut)}
        )
        for place, (wish, cut) in enumerate(zip(wishes, cuts, strict=True))
    ]
    output.write("metadata.jsonl", "".join(f"{line}\n" for line in lines).encode())
    if len({(wish.height, wish.width) for wish in wishes[:GRID]}) == 1:
        pictures = [read_picture(output.read(_name(place))) for place in range(min(total, GRID))]
        output.write("grid.png", png_bytes(image_grid(torch.stack(pictures))))
    if longer := sum(map(any, cuts)):
        print(
            f"sample: {longer} of {total} prompts are longer than the text encoders read; "
            f"metadata.jsonl says what was left out",
            flush=True,
        )
    print(f"sample: {total} pictures in {config.output_dir}", flush=True)
    return config.output_dir


def _batches(
    config: SampleConfig, wishes: list[Wish], weights: str, output: Folder
) -> Iterator[Batch]:
    """The batches of which something is missing."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, wish in enumerate(wishes):
        alike.setdefault(wish.alike(), []).append(place)
    there = output.list()
    for places in alike.values():
        for start in range(0, len(places), config.batch_size):
            part = places[start : start + config.batch_size]
            missing = [
                place
                for place in part
                if _name(place) not in there
                or _settings_in(output.read(_name(place))) != _settings(wishes[place], weights)
            ]
            if missing:
                yield Batch(part, [wishes[place] for place in part], missing)


def _draw(
    config: SampleConfig, zoo: ZooConfig, weights: str, batches: list[Batch]
) -> Iterator[int]:
    """Draw them on Ray; how many pictures each was, as they are done."""
    if not batches:
        return
    ensure_ray()
    import ray

    quiet_data()
    rows = [{"batch": json.dumps(to_dict(batch))} for batch in batches]
    answers = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Drawer,
        fn_constructor_args=[to_dict(config), to_dict(zoo), weights],
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(rows))),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for answered in answers.iter_rows():
        yield value_of(answered)


class _Drawer:
    """An actor that holds the student and the frozen models, which the first batch loads."""

    def __init__(self, config: dict[str, Any], zoo: dict[str, Any], weights: str):
        self._config = from_dict(SampleConfig, config, "the sample config")
        self._zoo, self._weights = from_dict(ZooConfig, zoo, "the zoo config"), weights
        self._sampler: Sampler | None = None
        self._output = open_folder(str(self._config.output_dir))

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        return answer(lambda: self._draw(str(rows["batch"][0])), "a picture cannot be written")

    def _draw(self, packed: str) -> int:
        batch = from_dict(Batch, json.loads(packed), "a batch")
        if self._sampler is None:
            model = load_student(str(self._config.checkpoint), "cpu", torch.float32)
            device = resolve_device(self._zoo.device)
            zoo = self._zoo.build(model.config)
            self._sampler = Sampler(zoo, model, device=device, dtype=self._zoo.dtype)
        first = batch.wishes[0]
        images = self._sampler.generate(
            [wish.prompt for wish in batch.wishes],
            num_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            height=first.height,
            width=first.width,
            seed=[wish.seed for wish in batch.wishes],
            negative_prompt=first.negative_prompt,
        )
        for place, wish, image in zip(batch.places, batch.wishes, images, strict=True):
            if place in batch.missing:
                note = PngInfo()
                note.add_text("tinyflux", _settings(wish, self._weights))
                self._output.write(_name(place), png_bytes(image, note))
        return len(batch.missing)


def _name(place: int) -> str:
    return f"{place:05d}.png"


def _settings(wish: Wish, weights: str) -> str:
    """What a picture depends on, kept in its file."""
    return json.dumps({**dataclasses.asdict(wish), "weights": weights}, sort_keys=True)


def _told(cut: CutTokens) -> dict[str, dict[str, int]]:
    """How many tokens of a prompt CLIP and T5 did not read, if any."""
    return {"prompt_truncated": cut._asdict()} if any(cut) else {}


def _settings_in(png: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(png)) as image:
            return image.info.get("tinyflux")
    except (OSError, ValueError):
        return None


def _fingerprint(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def read_picture(png: bytes) -> torch.Tensor:
    """A picture as ``[3, H, W]`` in [0, 1]."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
