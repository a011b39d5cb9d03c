"""A small classifier of pictures with several labels each, such as a thing and a style.

It is both a feature space of its own and a judge of labels. ``tinyflux.toy.train_classifier``
trains the one that ships.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tinyflux.errors import HubError, TinyFluxError
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.extractors import CLASSIFIER, in_batches, resize
from tinyflux.util.config import from_dict, to_dict
from tinyflux.util.files import atomic_write
from tinyflux.util.text import first_line

SHIPPED = Path(__file__).parents[1] / "toy" / "world" / "classifier"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass
class ClassifierConfig:
    """What a classifier is made of and how good it is.

    Attributes:
        labels: The labels that each head knows, by the head's name.
        side: Pixels of the squares that it looks at.
        channels: Channels at each resolution, from the finest, of half the side.
        width: Features of a picture.
        accuracy: What it reaches on real pictures that it was not trained on, by head; behind a
            head's name may stand what else is done to them, or what it chooses among.
        description: What it was trained on, and how.
    """

    labels: dict[str, list[str]]
    side: int = 32
    channels: tuple[int, ...] = (48, 96, 192)
    width: int = 256
    accuracy: dict[str, Estimate] = field(default_factory=dict)
    description: str = ""


class _Resolution(nn.Module):
    """A convolution to more channels, and what a second one adds to it."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.first = _convolution(inputs, channels)
        self.second = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, h, w]`` to ``[N, channels, h, w]``."""
        x = self.first(x)
        added: Tensor = self.second(x)
        return x + added


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Convolutions that halve the side at each resolution, and a linear head per label.

    The features are a linear map of each channel's mean and deviation at every resolution: a thing
    shows in the coarse ones, and a style in the fine ones.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        inputs = (12, *config.channels[:-1])
        self.resolutions = nn.ModuleList(map(_Resolution, inputs, config.channels))
        seen = 2 * sum(config.channels)
        self.trunk = nn.Sequential(nn.BatchNorm1d(seen), nn.Linear(seen, config.width))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.width, len(labels)) for name, labels in config.labels.items()}
        )

    def features(self, pictures: Tensor) -> Tensor:
        """``[N, width]`` of pictures ``[N, 3, H, W]`` in [-1, 1]."""
        x, seen = resize(pictures, self.config.side), []
        for index, resolution in enumerate(self.resolutions):
            # Nothing of the finest pixels is lost, at a quarter of the work.
            x = resolution(F.max_pool2d(x, 2) if index else F.pixel_unshuffle(x, 2))
            variance, mean = torch.var_mean(x, dim=(2, 3))
            # The square root has no slope at 0, where a channel sees nothing.
            seen += [mean, (variance + 1e-4).sqrt()]
        features: Tensor = self.trunk(torch.cat(seen, 1))
        return features

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Each head's ``[N, labels]`` of features ``[N, D]``."""
        return {name: head(features) for name, head in self.heads.items()}

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Each head's ``[N, labels]`` of pictures ``[N, 3, H, W]`` in [-1, 1]."""
        return self.logits(self.features(pictures))


def save_classifier(model: Classifier, folder: Path) -> None:
    """Write the weights in half precision, then the config, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    atomic_write(folder / WEIGHTS, save({name: part.contiguous() for name, part in halves.items()}))
    text = json.dumps(to_dict(model.config), indent=1, ensure_ascii=False) + "\n"
    atomic_write(folder / CONFIG, text.encode())


def load_classifier(folder: Path) -> tuple[Classifier, str]:
    """The classifier in ``folder``, frozen, and the digest of its weights.

    Raises:
        HubError: there is none, or its files do not belong together.
    """
    try:
        config = from_dict(
            ClassifierConfig, json.loads((folder / CONFIG).read_bytes()), str(folder / CONFIG)
        )
        stored = (folder / WEIGHTS).read_bytes()
        model = Classifier(config)
        model.load_state_dict(load(stored))
    except (OSError, ValueError, RuntimeError, SafetensorError, TinyFluxError) as error:
        raise HubError(
            f"no classifier can be opened at '{folder}': {first_line(error):.200}"
        ) from error
    return model.eval().requires_grad_(False), hashlib.sha256(stored).hexdigest()


class ClassifierFeatures:
    """The extractor ``classifier``: what the heads see, and the heads' labels.

    Args:
        name: as in a run file.
        folder: where :func:`save_classifier` wrote it.
    """

    def __init__(self, name: str, folder: Path, device: torch.device):
        model, digest = load_classifier(folder)
        self.name, self.config, self._device = name, model.config, device
        self.fingerprint = f"{CLASSIFIER} {digest[:16]}"
        self._model = model.to(device)

    def __call__(self, pictures: Tensor) -> Tensor:
        return in_batches(self._model.features, pictures, self._device)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Each head's ``[N, labels]``, on the CPU, of features ``[N, D]`` that it gave."""
        made = self._model.logits(features.to(self._device))
        return {name: part.cpu() for name, part in made.items()}


def open_classifier(place: str, device: torch.device) -> ClassifierFeatures:
    """The classifier in the directory ``place``, or the one that ships if it is empty.

    Raises:
        HubError: there is none.
    """
    name = f"{CLASSIFIER}:{place}" if place else CLASSIFIER
    return ClassifierFeatures(name, Path(place) if place else SHIPPED, device)
