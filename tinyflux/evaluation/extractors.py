"""Feature extractors by name: what a picture is measured by.

``efficientnet-lite0`` and ``classifier`` need no network. ``clip``, ``dinov2`` and ``inception``
take a name or a directory behind a colon, such as ``clip:openai/clip-vit-large-patch14``.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyflux.errors import ConfigError, InputError
from tinyflux.util.config import nearest

BATCH = 32  # pictures of one forward

EFFICIENTNET, CLASSIFIER = "efficientnet-lite0", "classifier"
CLIP, DINOV2, INCEPTION = "clip", "dinov2", "inception"


@runtime_checkable
class FeatureExtractor(Protocol):
    """A frozen network that says in numbers what pictures show.

    Attributes:
        name: As it stands in a run file.
        fingerprint: Tells its weights and its preparation of pictures from any other's.
    """

    name: str
    fingerprint: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features ``[N, D]``, fp32 on the CPU, of pictures ``[N, 3, H, W]`` in [-1, 1]."""
        ...


@runtime_checkable
class CaptionExtractor(FeatureExtractor, Protocol):
    """An extractor that embeds captions in the space of its pictures."""

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[N, D]``, fp32 on the CPU."""
        ...


def open_extractor(name: str, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The extractor of a run file's name.

    Raises:
        ConfigError: no extractor has that name, or it lacks what stands behind the colon.
        MissingDependencyError: its package is not installed.
        HubError: its weights cannot be opened.
    """
    kind, _, place = check_extractor_name(name).partition(":")
    target = torch.device(device)
    if kind == EFFICIENTNET:
        from tinyflux.evaluation.efficientnet import EfficientNetFeatures

        return EfficientNetFeatures(target)
    if kind == CLASSIFIER:
        from tinyflux.evaluation.classifier import open_classifier

        return open_classifier(place, target)
    if kind == INCEPTION:
        from tinyflux.evaluation.inception import InceptionFeatures

        return InceptionFeatures(place, target)
    from tinyflux.evaluation.vision import ClipFeatures, DinoFeatures

    return (ClipFeatures if kind == CLIP else DinoFeatures)(place, target)


def check_extractor_name(name: str) -> str:
    """``name``, if an extractor can have it; a ConfigError if not."""
    kind, _, place = name.partition(":")
    kinds = {EFFICIENTNET: "", CLASSIFIER: "", CLIP: "NAME", DINOV2: "NAME",
             INCEPTION: "FILE"}  # fmt: skip
    if kind not in kinds:
        raise ConfigError(
            f"the extractor '{name}' is unknown{nearest(kind, kinds)}: choose one of "
            f"{', '.join(kinds)}"
        )
    if kinds[kind] and not place:
        raise ConfigError(
            f"the extractor '{kind}' needs to know its weights: say {kind}:{kinds[kind]}"
        )
    if place and kind == EFFICIENTNET:
        raise ConfigError(f"the extractor '{kind}' takes nothing behind its name, not ':{place}'")
    return name


def resize(pictures: Tensor, side: int) -> Tensor:
    """Squares of ``side`` pixels by an antialiased bicubic filter (clean-fid, arXiv 2104.11222).

    Without the filter a smaller picture holds patterns that are not in the large one, and the
    figures tell of these. A picture that is not square is squeezed, not cut.
    """
    if pictures.shape[-2:] == (side, side):
        return pictures
    resized = F.interpolate(
        pictures, size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(-1, 1)  # bicubic overshoots at edges


def in_batches(
    forward: Callable[[Tensor], Tensor], pictures: Tensor, device: torch.device
) -> Tensor:
    """``forward`` over a few pictures at a time: ``[N, D]``, fp32 on the CPU.

    Raises:
        InputError: the pictures are not ``[N, 3, H, W]`` in [-1, 1].
    """
    check_pictures(pictures)
    with torch.inference_mode():
        parts = [forward(part.to(device).float()).float().cpu() for part in pictures.split(BATCH)]
    return torch.cat(parts)


def check_pictures(pictures: Tensor) -> None:
    """Refuse what is not ``[N, 3, H, W]`` in [-1, 1], N above 0, with an InputError."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise InputError(f"pictures must be [N, 3, H, W], not {list(pictures.shape)}")
    low, high = pictures.min().item(), pictures.max().item()
    if not (low >= -1.001 and high <= 1.001):  # NaN, too
        raise InputError(f"pictures must hold values from -1 to 1, not from {low:g} to {high:g}")
