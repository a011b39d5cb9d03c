"""From noise to pictures: steps along the probability flow, with guidance.

The pure functions on top and :mod:`tinyflux.inference.solvers` are the sampler's whole algorithm;
:class:`Sampler` joins them with the encoders, the VAE and the seeds.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tinyflux.errors import InputError
from tinyflux.inference.checks import check_sampling
from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.solvers import Trajectory, check_solver
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import token_grid
from tinyflux.model.time_shift import flux_shift, shift_at
from tinyflux.util.files import atomic_write
from tinyflux.util.images import grid_columns, image_grid, png_bytes
from tinyflux.util.seeding import randn_for

DECODE_BATCH = 8  # pictures in the VAE at once, which takes far more memory than the student


class Encoders(Protocol):
    """What the sampler needs of a ModelZoo."""

    @property
    def downscale(self) -> int:
        """Pixels of a latent's side."""
        ...

    def encode_prompts_batched(self, prompts: list[str], *args: Any, **kwargs: Any) -> Any: ...

    def decode_latents(self, latents: Tensor, shift: float | None = None) -> Tensor: ...


class AveragedWeights(Protocol):
    """What the sampler needs of an :class:`~tinyflux.trainer.ema.EMA`."""

    def apply_shadow(self, model: torch.nn.Module) -> None: ...

    def restore(self, model: torch.nn.Module) -> None: ...


def sample_grid(num_steps: int, shift: float) -> Tensor:
    """Times ``[num_steps + 1]`` from 0 (noise) to 1 (data), shifted."""
    return flux_shift(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64), shift).float()


def sample_times(config: TinyFluxConfig, num_steps: int, height: int, width: int) -> list[float]:
    """The times that a model's config asks for in a picture of ``height`` x ``width`` latents."""
    shift = shift_at(config.timestep_shift, height * width, config.timestep_shift_tokens)
    return sample_grid(num_steps, shift).tolist()


def initial_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """``[len(seeds), C, H, W]``, each from its own seed on the CPU."""
    return torch.stack([randn_for((channels, height, width), "sample", seed) for seed in seeds])


def decode(zoo: Encoders, latents: Tensor, shift: float) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [0, 1], fp32, of ``[B, C, h, w]``, a few at a time."""
    parts = [zoo.decode_latents(part, shift=shift) for part in latents.split(DECODE_BATCH)]
    return torch.cat([part.float().clamp(0, 1) for part in parts])


class Sampler:
    """Pictures from prompts.

    Args:
        zoo: encodes the prompts and decodes the latents.
        model: the student; moved to ``device``.
        ema: weights to use instead of the model's own.
        dtype: the forward's precision; fp32 weights run under autocast to it.
    """

    def __init__(
        self,
        zoo: Encoders,
        model: TinyFluxDeep,
        ema: AveragedWeights | None = None,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.zoo, self.model, self.ema = zoo, model, ema
        self.device, self.dtype = torch.device(device), dtype
        model.to(self.device)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[str],
        num_steps: int = 28,
        guidance_scale: float = 5.0,
        height: int = 64,
        width: int = 64,
        seed: int | Sequence[int] | None = None,
        use_ema: bool = True,
        negative_prompt: str = "blurry, low quality",
        callback: Callable[[int, int, Tensor], None] | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in [0, 1], fp32.

        Args:
            height, width: in latents; a picture is the VAE's downscale (8) times larger.
            seed: sample ``i`` uses ``seed + i``, or the i-th of a list; None draws one. A picture
                depends on its own seed, prompt and settings only.
            negative_prompt: what to steer away from; empty is the null caption. Unused at a
                ``guidance_scale`` of 1.
            callback: called as ``callback(step, num_steps, latents)`` after each step.
            solver: ``"euler"``, ``"heun"`` (two forwards a step) or ``"multistep"``.

        Raises:
            InputError: an empty prompt, an unknown solver, or sizes, steps, guidance or seeds out
                of range.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of texts, not one text")
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"prompt {index} is empty: say what the picture should show")
        if not prompts:
            raise InputError("there are no prompts")
        seeds = _seeds(seed, len(prompts))
        check_sampling(height, width, num_steps, guidance_scale, seeds)
        check_solver(solver)
        token_grid(height, width, self.model.config.patch_size)

        cond = self._encode(prompts)
        uncond = None
        if guidance_scale != 1.0:
            null = self._encode([negative_prompt])
            uncond = TextCondition(null.t5.expand_as(cond.t5), null.pooled.expand_as(cond.pooled))
        config = self.model.config
        x = initial_noise(seeds, config.in_channels, height, width).to(self.device)
        path = Trajectory(x, sample_times(config, num_steps, height, width), solver)
        with self._inference_weights(use_ema):
            while path.evaluations:
                t = torch.full((len(prompts),), path.t, device=self.device)
                v = guided_velocity(
                    self._forward, path.x, t, cond, uncond, guidance_scale, config.patch_size
                )
                if path.advance(v) and callback is not None:
                    callback(path.step, num_steps, path.x)
        return decode(self.zoo, path.x, config.latent_shift)

    def save_samples(
        self,
        images: Tensor,
        prompts: list[str],
        output_dir: str,
        step: int | None = None,
    ) -> str:
        """Write a PNG grid of ``images`` ``[B, 3, H, W]`` and a JSON of its prompts.

        Returns:
            The path of the PNG, ``samples.png`` or ``step_00001000.png``.
        """
        return write_samples(images, prompts, output_dir, step)

    def _encode(self, prompts: list[str]) -> TextCondition:
        empty = not prompts[0].strip()
        t5, pooled = self.zoo.encode_prompts_batched(prompts, allow_empty=empty)
        dtype = next(self.model.parameters()).dtype
        return TextCondition(t5.to(self.device, dtype), pooled.to(self.device, dtype))

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        weights = next(self.model.parameters()).dtype
        mixed = weights == torch.float32 and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            velocity: Tensor = self.model(*args, **kwargs)
        return velocity

    @contextmanager
    def _inference_weights(self, use_ema: bool) -> Iterator[None]:
        """Evaluation mode with the EMA's weights; both are undone whatever happens."""
        training = self.model.training
        ema = self.ema if use_ema else None
        self.model.eval()
        try:
            if ema is not None:
                ema.apply_shadow(self.model)
            try:
                yield
            finally:
                if ema is not None:
                    ema.restore(self.model)
        finally:
            self.model.train(training)


def write_samples(
    images: Tensor, prompts: Sequence[str], output_dir: str | os.PathLike[str], step: int | None
) -> str:
    """See :meth:`Sampler.save_samples`."""
    if images.shape[0] != len(prompts):
        raise InputError(f"{images.shape[0]} images do not fit {len(prompts)} prompts")
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = sample_path(directory, step)
    columns = grid_columns(len(prompts))
    record = {"step": step, "columns": columns, "prompts": list(prompts)}
    atomic_write(path.with_suffix(".json"), json.dumps(record, indent=2).encode())
    atomic_write(path, png_bytes(image_grid(images)))
    return str(path)


def sample_path(directory: Path, step: int | None) -> Path:
    """``step_00001000.png``, or ``samples.png`` without a step."""
    return directory / ("samples.png" if step is None else f"step_{step:08d}.png")


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per sample."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if isinstance(seed, int):
        return [seed + index for index in range(count)]
    if len(seed) != count:
        raise InputError(f"{len(seed)} seeds do not fit {count} prompts")
    return [int(item) for item in seed]
