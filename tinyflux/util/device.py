"""Which device models run on."""

import torch

from tinyflux.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for, but there is no GPU: use device 'cpu'")
    return torch.device(device)
