"""Prompts to be drawn in bulk, from a run file and from prompt files."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyflux.distributed.config import SampleConfig
from tinyflux.errors import InputError
from tinyflux.inference.checks import check_sampling
from tinyflux.inference.request import SampleRequest
from tinyflux.util.config import nearest
from tinyflux.util.limits import MAX_SIDE
from tinyflux.util.picture_size import PictureSize, check_side, parse_size

logger = logging.getLogger(__name__)

FORMER_SIDES = ("height", "width")  # in latents
KEYS = (
    "prompt", "negative_prompt", "num_steps", "guidance_scale", "size", "seed", *FORMER_SIDES
)  # fmt: skip


@dataclass(frozen=True)
class PromptLine:
    """A prompt as it was given.

    Attributes:
        where: The prompt's place, for messages.
        values: What is given for it, by the names of ``KEYS``.
    """

    where: str
    values: Mapping[str, Any]


def read_prompts(prompts: Sequence[str], file: str | None) -> list[PromptLine]:
    """``prompts`` and then those of ``file``.

    Args:
        prompts: texts.
        file: a prompt a line, or with the suffix ``.jsonl`` an object a line, of any of ``KEYS``.

    Raises:
        InputError: there are none, or a line that is none.
    """
    lines = [PromptLine(f"prompt {index}", {"prompt": text}) for index, text in enumerate(prompts)]
    if file is not None:
        lines += _lines_of(file)
    if not lines:
        raise InputError("there are no prompts: set sample.prompts or sample.prompts_file")
    return lines


def sample_requests(
    lines: Sequence[PromptLine], config: SampleConfig, downscale: int
) -> list[SampleRequest]:
    """What the lines ask for; the i-th has ``config.seed + i`` unless it says another.

    Args:
        lines: of :func:`read_prompts`.
        config: what a line does not say.
        downscale: pixels of a latent's side.

    Raises:
        InputError: a line that cannot be drawn.
        ConfigError: ``config`` asks for a size that latents cannot fill.
    """
    size = config.picture_size(downscale)
    requests = []
    for index, line in enumerate(lines):
        defaults = {
            "negative_prompt": config.negative_prompt,
            "num_steps": config.num_steps,
            "guidance_scale": config.guidance_scale,
            "seed": config.seed + index,
        }
        try:
            requests.append(_request({**defaults, **line.values}, size, downscale))
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from error
    return requests


def _lines_of(file: str) -> Iterator[PromptLine]:
    try:
        texts = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sample.prompts_file '{file}' cannot be read: {error}") from error
    in_latents = False
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        if not file.endswith(".jsonl"):
            yield PromptLine(where, {"prompt": text.strip()})
            continue
        line = PromptLine(where, _object(text, where))
        if not in_latents and line.values.keys() & set(FORMER_SIDES):
            in_latents = True
            logger.warning(
                f"{where}: height and width are in latents and will not be known after this "
                'release: write "size", in pixels, instead'
            )
        yield line


def _object(text: str, where: str) -> dict[str, Any]:
    """The object of a ``.jsonl`` file's line."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise InputError(f'{where} must be an object with a "prompt"')
    for key in values:
        if key not in KEYS:
            raise InputError(f"{where}: '{key}' is not a setting{nearest(key, KEYS)}")
    if former := [name for name in FORMER_SIDES if name in values and "size" in values]:
        raise InputError(
            f"{where}: size and {' and '.join(former)} are both given: keep size, which is in "
            "pixels"
        )
    return values


def _request(values: Mapping[str, Any], default: PictureSize, downscale: int) -> SampleRequest:
    for name in ("prompt", "negative_prompt"):
        if not isinstance(values[name], str):
            raise InputError(f"{name} must be text, not {values[name]!r}")
    if not values["prompt"].strip():
        raise InputError("the prompt is empty")
    for name in ("seed", "guidance_scale"):
        if isinstance(values[name], bool) or not isinstance(values[name], int | float):
            raise InputError(f"{name} must be a number, not {values[name]!r}")
    if not isinstance(values["seed"], int):
        raise InputError(f"seed must be a whole number, not {values['seed']!r}")
    size = _size(values, default, downscale)
    request = SampleRequest(
        prompt=values["prompt"],
        negative_prompt=values["negative_prompt"],
        num_steps=values["num_steps"],
        guidance_scale=float(values["guidance_scale"]),  # a file may say 5 and mean 5.0
        height=size.height,
        width=size.width,
        seed=values["seed"],
    )
    check_sampling(
        request.height // downscale,
        request.width // downscale,
        request.num_steps,
        request.guidance_scale,
        [request.seed],
    )
    return request


def _size(values: Mapping[str, Any], default: PictureSize, downscale: int) -> PictureSize:
    """The size that a line asks for, in pixels."""
    if "size" in values:
        size = parse_size(values["size"])
        check_side("the size's width", size.width, downscale, MAX_SIDE * downscale)
        check_side("the size's height", size.height, downscale, MAX_SIDE * downscale)
        return size
    sides = default._asdict()
    for name in FORMER_SIDES:
        if name in values:
            latents = values[name]
            if type(latents) is not int or not 1 <= latents <= MAX_SIDE:
                raise InputError(
                    f"{name} must be a whole number from 1 to {MAX_SIDE}, not {latents!r}"
                )
            sides[name] = latents * downscale
    return PictureSize(**sides)
