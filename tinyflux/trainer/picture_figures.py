"""Figures of pictures beside training: captions drawn with fixed seeds, against real pictures."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinyflux.errors import ConfigError, InputError
from tinyflux.evaluation.drawing import DrawBatch, DrawSettings, draw, features_of
from tinyflux.evaluation.extractors import FeatureExtractor
from tinyflux.evaluation.figures import FEWEST, REAL, Pictures, figures
from tinyflux.inference.sampler import Sampler
from tinyflux.trainer.direction import MEASURED


class PictureFigures:
    """Draws a set's captions with a model's EMA, and measures the pictures.

    Args:
        sampler: of the model and its EMA.
        extractors: the first one's figures are ``eval_kid`` and so on, another one's have its
            kind behind, such as ``eval_kid_clip``.
        batches: what is drawn, in the order of the real pictures.
        real: features ``[N, D]`` of the real pictures, by extractor's fingerprint.
        settings: how pictures are drawn.
        among: captions that a picture has to find its own among, with CLIP.

    Raises:
        ConfigError: no extractor, two of one kind, or too few pictures.
    """

    def __init__(
        self,
        sampler: Sampler,
        extractors: Sequence[FeatureExtractor],
        batches: Sequence[DrawBatch],
        real: Mapping[str, Tensor],
        settings: DrawSettings,
        among: int = 100,
    ):
        self._sampler, self._extractors, self._batches = sampler, list(extractors), list(batches)
        self._real, self._settings, self._among = dict(real), settings, among
        self._captions = [caption for batch in batches for caption in batch.captions]
        self._suffixes = _suffixes(self._extractors)
        if len(self._captions) < FEWEST:
            raise ConfigError(
                f"trainer.evaluate_every needs at least {FEWEST} held-out pictures to measure "
                f"against, and there are {len(self._captions)}: raise trainer.val_fraction or "
                "trainer.evaluate_pictures, or leave trainer.evaluate_every out"
            )

    def measure(self) -> dict[str, float]:
        """Every figure that the extractors allow, by its name in ``metrics.jsonl``."""
        parts = [
            features_of(self._extractors, draw(self._sampler, batch, self._settings))
            for batch in self._batches
        ]
        values: dict[str, float] = {}
        for extractor, suffix in zip(self._extractors, self._suffixes, strict=True):
            drawn = torch.cat([part[extractor.fingerprint] for part in parts])
            pictures = Pictures(self._real[extractor.fingerprint], drawn, self._captions, {})
            made = figures(extractor, pictures, self._among).figures
            values |= {
                f"{MEASURED}{name}{suffix}": estimate.value
                for name, estimate in made.items()
                if not name.startswith(REAL)  # no training changes what the real pictures reach
            }
        return values


def figures_of_pictures(
    sampler: Sampler,
    extractors: Sequence[FeatureExtractor],
    captions: Sequence[str],
    pictures: Tensor,
    settings: DrawSettings,
    seed: int = 0,
    batch_size: int = 16,
) -> PictureFigures:
    """Figures against real pictures in memory, for the plain ``Trainer``.

    Args:
        captions: N of them.
        pictures: ``[N, 3, H, W]`` in [0, 1].
        seed: caption i is drawn with ``seed + i``.
        batch_size: pictures drawn at once.

    Raises:
        InputError: numbers of captions and pictures that differ, or a size that cannot be drawn.
    """
    downscale = sampler.zoo.downscale
    height, width = pictures.shape[-2:]
    if len(captions) != len(pictures) or height % downscale or width % downscale:
        raise InputError(
            f"{len(captions)} captions and {len(pictures)} pictures of {width}x{height} pixels: "
            f"each needs its caption, and sides must be multiples of {downscale}"
        )
    grid = height // downscale, width // downscale
    batches = [
        DrawBatch(captions[start : start + batch_size], grid, seed + start)
        for start in range(0, len(captions), batch_size)
    ]
    return PictureFigures(sampler, extractors, batches, features_of(extractors, pictures), settings)


def _suffixes(extractors: Sequence[FeatureExtractor]) -> list[str]:
    """What stands behind the names of each one's figures."""
    kinds = [extractor.name.partition(":")[0] for extractor in extractors]
    if not kinds:
        raise ConfigError("trainer.evaluate_every needs a name in evaluate.extractors")
    if len(set(kinds)) < len(kinds):
        raise ConfigError(
            f"evaluate.extractors has two of one kind ({', '.join(kinds)}), whose figures beside "
            "training would have one name: leave one out, or leave trainer.evaluate_every out"
        )
    return ["", *(f"_{kind}" for kind in kinds[1:])]
