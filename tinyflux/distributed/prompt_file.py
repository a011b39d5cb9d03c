"""Prompts to be drawn in bulk, from a config and from files."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyflux.errors import InputError
from tinyflux.inference.sampler import check_request
from tinyflux.util.config import nearest


@dataclass(frozen=True)
class Wish:
    """One picture that is wanted; sizes are in latents."""

    prompt: str
    negative_prompt: str
    num_steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int

    def alike(self) -> tuple[Any, ...]:
        """What pictures of one batch have in common."""
        values = dataclasses.asdict(self)
        return tuple(values[name] for name in sorted(values.keys() - {"prompt", "seed"}))


KEYS = tuple(item.name for item in dataclasses.fields(Wish))


def read_wishes(prompts: list[str], file: str | None, defaults: Mapping[str, Any]) -> list[Wish]:
    """``prompts`` and then those of ``file``; the i-th has ``seed + i`` unless it says another.

    Args:
        file: a prompt a line, or with the suffix ``.jsonl`` an object a line: ``prompt`` and any
            of a wish's other fields.
        defaults: the fields of a wish that says nothing.

    Raises:
        InputError: there are none, or a line that cannot be drawn.
    """
    given = [(f"prompt {index}", {"prompt": text}) for index, text in enumerate(prompts)]
    if file is not None:
        given += _lines(file)
    if not given:
        raise InputError("there are no prompts: set sample.prompts or sample.prompts_file")
    return [
        _wish({**defaults, "seed": defaults["seed"] + index, **values}, where)
        for index, (where, values) in enumerate(given)
    ]


def _lines(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"sample.prompts_file '{file}' cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        if not file.endswith(".jsonl"):
            yield where, {"prompt": line.strip()}
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(values, dict) or "prompt" not in values:
            raise InputError(f'{where} must be an object with a "prompt"')
        for key in values:
            if key not in KEYS:
                raise InputError(f"{where}: '{key}' is not a setting{nearest(key, KEYS)}")
        yield where, values


def _wish(values: Mapping[str, Any], where: str) -> Wish:
    for name in ("prompt", "negative_prompt"):
        if not isinstance(values[name], str):
            raise InputError(f"{where}: {name} must be text, not {values[name]!r}")
    if not values["prompt"].strip():
        raise InputError(f"{where}: the prompt is empty")
    for name in ("seed", "guidance_scale"):
        if isinstance(values[name], bool) or not isinstance(values[name], int | float):
            raise InputError(f"{where}: {name} must be a number, not {values[name]!r}")
    if not isinstance(values["seed"], int):
        raise InputError(f"{where}: seed must be a whole number, not {values['seed']!r}")
    wish = Wish(**values)
    try:
        check_request(wish.height, wish.width, wish.num_steps, wish.guidance_scale, [wish.seed])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return wish
