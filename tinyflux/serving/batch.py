"""Pictures for a list of prompts, one file each; a second run draws only what is missing."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tinyflux.errors import ConfigError, InputError
from tinyflux.model.loader import load_model
from tinyflux.model.zoo import ZooConfig, resolve_device
from tinyflux.serving.pictures import png_bytes
from tinyflux.trainer.sampling import Sampler, image_grid
from tinyflux.util.files import atomic_write


@dataclass
class SampleConfig:
    """What to draw.

    Attributes:
        prompts: the prompts; ``prompts_file`` adds one per line of a text file.
        num_steps, guidance_scale, negative_prompt: of the sampler.
        height, width: in latents; a picture is the VAE's downscale times larger.
        seed: the i-th prompt uses ``seed + i``.
        checkpoint: a directory, file or hub repository; None is the run's ``final``.
        output_dir: None is ``drawn`` in the run directory.
        batch_size: pictures drawn at once.
    """

    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    num_steps: int = 28
    guidance_scale: float = 5.0
    height: int = 64
    width: int = 64
    seed: int = 0
    negative_prompt: str = ""
    checkpoint: str | None = None
    output_dir: str | None = None
    batch_size: int = 16


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts of the config and of its file.

    Raises:
        InputError: the file cannot be read, or there are no prompts.
    """
    prompts = list(config.prompts)
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"sample.prompts_file '{config.prompts_file}' cannot be read: {error}"
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("there are no prompts: set sample.prompts or sample.prompts_file")
    return prompts


def sample_prompts(config: SampleConfig, zoo: ZooConfig) -> Path:
    """Draw every prompt that has no picture yet, then a grid of all; the grid's path."""
    if config.checkpoint is None or config.output_dir is None:
        raise ConfigError("sample.checkpoint and sample.output_dir must be set")
    prompts, output = read_prompts(config), Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"{index:05d}.png" for index in range(len(prompts))]
    model = load_model(config.checkpoint, device="cpu", dtype=torch.float32)
    weights = _fingerprint(model)
    settings = [_settings(config, prompt, index, weights) for index, prompt in enumerate(prompts)]
    missing = [i for i, path in enumerate(paths) if _settings_in(path) != settings[i]]
    print(f"sample: {len(prompts) - len(missing)} of {len(prompts)} are there", flush=True)
    sampler = Sampler(
        zoo.build(model.config), model, device=resolve_device(zoo.device), dtype=zoo.dtype
    )
    for part in _parts(missing, config.batch_size):
        chosen = [prompts[index] for index in part]
        images = sampler.generate(
            chosen,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            height=config.height,
            width=config.width,
            seed=[config.seed + index for index in part],
            negative_prompt=config.negative_prompt,
        )
        for index, image in zip(part, images, strict=True):
            note = PngInfo()
            note.add_text("tinyflux", settings[index])
            atomic_write(paths[index], png_bytes(image, note))
        print(f"sample: {paths[part[-1]]}", flush=True)
    grid = output / "grid.png"
    together = image_grid(torch.stack([read_picture(path) for path in paths]))
    atomic_write(grid, png_bytes(together))
    print(f"sample: {len(prompts)} pictures, together in {grid}", flush=True)
    return grid


def _settings(config: SampleConfig, prompt: str, index: int, weights: str) -> str:
    """What a picture depends on, kept in its file."""
    names = ("num_steps", "guidance_scale", "height", "width", "negative_prompt")
    values = {name: getattr(config, name) for name in names}
    values |= {"prompt": prompt, "seed": config.seed + index, "weights": weights}
    return json.dumps(values, sort_keys=True)


def _settings_in(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get("tinyflux")
    except (OSError, ValueError):
        return None


def _fingerprint(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def read_picture(path: Path) -> torch.Tensor:
    """A picture file as ``[3, H, W]`` in [0, 1]."""
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
