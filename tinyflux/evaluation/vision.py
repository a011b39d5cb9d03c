"""CLIP and DINOv2 of ``transformers`` as extractors, from a hub repository or a directory."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from tinyflux.evaluation.extractors import CLIP, DINOV2, in_batches, resize
from tinyflux.model.pretrained import open_pretrained

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SIDE = 224  # its pictures in training; its config names the 518 of the last steps


class _Prepare:
    """Pictures in [-1, 1] as a model wants them: its side, and its channels' mean and deviation.

    Args:
        place: the model's repository or directory; a ``preprocessor_config.json`` there decides on
            mean and deviation.
    """

    def __init__(
        self, place: str, side: int, mean: tuple[float, ...], deviation: tuple[float, ...]
    ):
        self.side = side
        try:
            stored, _ = BaseImageProcessor.get_image_processor_dict(place)
        except OSError:
            stored = {}
        self.mean = tuple(stored.get("image_mean", mean))
        self.deviation = tuple(stored.get("image_std", deviation))

    def __call__(self, pictures: Tensor) -> Tensor:
        mean = pictures.new_tensor(self.mean)[:, None, None]
        deviation = pictures.new_tensor(self.deviation)[:, None, None]
        return ((resize(pictures, self.side) + 1) / 2 - mean) / deviation

    def __str__(self) -> str:
        return f"{self.side} px bicubic, mean {self.mean}, deviation {self.deviation}"


class ClipFeatures:
    """The extractor ``clip:NAME``: pictures and captions in one space.

    Raises:
        HubError: there is no such model, or its tokenizer is missing.
    """

    def __init__(self, place: str, device: torch.device):
        self.name = f"{CLIP}:{place}"
        self._device = device
        self._model: Any = _open(CLIPModel, place, device)
        self._tokenizer = open_pretrained(AutoTokenizer, place)
        vision = self._model.config.vision_config
        self._prepare = _Prepare(place, vision.image_size, CLIP_MEAN, CLIP_DEVIATION)
        self.fingerprint = f"{CLIP} {_digest(self._model)} {self._prepare}"

    def __call__(self, pictures: Tensor) -> Tensor:
        return in_batches(self._embed, pictures, self._device)

    def _embed(self, pictures: Tensor) -> Tensor:
        seen = self._model.vision_model(pixel_values=self._prepare(pictures))
        features: Tensor = self._model.visual_projection(seen.pooler_output)
        return features

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`tinyflux.evaluation.extractors.CaptionExtractor.captions`."""
        parts = []
        for start in range(0, len(texts), 64):
            tokens = self._tokenizer(
                list(texts[start : start + 64]),
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._device)
            read = self._model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            parts.append(self._model.text_projection(read.pooler_output).float().cpu())
        return torch.cat(parts)


class DinoFeatures:
    """The extractor ``dinov2:NAME``: the class token of any vision transformer that has one.

    Raises:
        HubError: there is no such model.
    """

    def __init__(self, place: str, device: torch.device):
        self.name = f"{DINOV2}:{place}"
        self._device = device
        self._model: Any = _open(AutoModel, place, device)
        side = min(DINO_SIDE, self._model.config.image_size)
        self._prepare = _Prepare(place, side, IMAGENET_MEAN, IMAGENET_DEVIATION)
        self.fingerprint = f"{DINOV2} {_digest(self._model)} {self._prepare}"

    def __call__(self, pictures: Tensor) -> Tensor:
        return in_batches(
            lambda part: self._model(pixel_values=self._prepare(part)).last_hidden_state[:, 0],
            pictures,
            self._device,
        )


def _open(cls: Any, place: str, device: torch.device) -> PreTrainedModel:
    opened = open_pretrained(cls, place, dtype=torch.float32)
    model: PreTrainedModel = opened.to(device).eval().requires_grad_(False)
    return model


def _digest(model: PreTrainedModel) -> str:
    """What tells the weights from others, wherever they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
