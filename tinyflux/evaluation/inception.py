"""FID's own Inception-v3, by torch-fidelity, from a file of weights on this machine.

Neither package carries the weights, and torch-fidelity would fetch them: a machine without a
network is told so here instead.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyflux.errors import HubError, MissingDependencyError
from tinyflux.evaluation.extractors import INCEPTION, in_batches
from tinyflux.util.files import file_sha256

LAYER = "2048"


class InceptionFeatures:
    """The extractor ``inception:FILE``: the 2,048 features that published FIDs are of.

    torch-fidelity enlarges pictures to 299 px as TensorFlow 1 did, from whole numbers 0 to 255.

    Raises:
        HubError: there is no such file, or it holds something else.
        MissingDependencyError: torch-fidelity is not installed.
    """

    def __init__(self, place: str, device: torch.device):
        if not Path(place).is_file():
            raise HubError(
                f"there is no file '{place}' with Inception's weights: fetch "
                "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases once, and "
                "name it as inception:FILE"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingDependencyError(
                f"the extractor '{INCEPTION}' needs torch-fidelity: pip install "
                "'tinyflux[inception]'"
            ) from error
        self.name = f"{INCEPTION}:{place}"
        self.fingerprint = f"{INCEPTION} {file_sha256(place)[:16]} layer {LAYER}"
        self._device = device
        try:
            self._model: Any = FeatureExtractorInceptionV3(
                INCEPTION, [LAYER], feature_extractor_weights_path=place
            ).to(device)
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            raise HubError(
                f"'{place}' does not hold Inception's weights: {error!s:.200}"
            ) from error

    def __call__(self, pictures: Tensor) -> Tensor:
        return in_batches(self._features, pictures, self._device)

    def _features(self, pictures: Tensor) -> Tensor:
        whole = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = self._model(whole)[0]
        return features
