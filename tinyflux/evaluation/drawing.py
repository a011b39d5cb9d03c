"""Pictures as they are measured: drawn with fixed seeds, and rounded as files hold them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tinyflux.evaluation.extractors import FeatureExtractor
from tinyflux.inference.sampler import Sampler


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn.

    Attributes:
        num_steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        negative_prompt: What guidance leads away from.
    """

    num_steps: int
    guidance_scale: float
    negative_prompt: str


@dataclass(frozen=True)
class DrawBatch:
    """Captions that are drawn together.

    Attributes:
        captions: N of them.
        grid: Height and width in latents.
        seed: Of the first; the i-th after it has ``seed + i``.
    """

    captions: Sequence[str]
    grid: tuple[int, int]
    seed: int


def draw(sampler: Sampler, batch: DrawBatch, settings: DrawSettings) -> Tensor:
    """Pictures ``[N, 3, H, W]`` in [0, 1] on the CPU, as a file would hold them.

    The same weights, batch and settings give the same pictures, in a training and after it.
    """
    pictures = sampler.generate(
        list(batch.captions),
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        height=batch.grid[0],
        width=batch.grid[1],
        seed=batch.seed,
        negative_prompt=settings.negative_prompt,
    )
    return as_stored(pictures.cpu())


def as_stored(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1], rounded to the 256 values of a file's bytes."""
    return (pictures * 255).round() / 255


def features_of(extractors: Iterable[FeatureExtractor], pictures: Tensor) -> dict[str, Tensor]:
    """Features ``[N, D]`` of pictures ``[N, 3, H, W]`` in [0, 1], by extractor's fingerprint."""
    return {one.fingerprint: one(pictures * 2 - 1) for one in extractors}
