"""The student that is served, from this machine, the hub or a URL."""

import contextlib
import os
from pathlib import Path

import torch

from tinyflux.errors import StorageError
from tinyflux.model.loader import CONFIG_NAME, WEIGHTS_NAME, load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.storage.copies import fetch
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.urls import is_url


def load_student(checkpoint: str, device: str, dtype: torch.dtype) -> TinyFluxDeep:
    """:func:`~tinyflux.model.loader.load_model`, which a URL may be given to as well.

    Raises:
        TinyFluxError: it cannot be fetched or opened.
    """
    return load_model(fetch(checkpoint, (WEIGHTS_NAME, CONFIG_NAME)), device=device, dtype=dtype)


def signature(checkpoint: str) -> tuple[tuple[str, int, int], ...] | None:
    """What changes when a checkpoint is replaced; None where there is none, or none can be seen."""
    if is_url(checkpoint):
        with contextlib.suppress(StorageError):
            files = RemoteFolder(checkpoint).infos()
            return tuple((name, info.mtime_ns, info.size) for name, info in files.items()
                         if name == WEIGHTS_NAME) or None  # fmt: skip
        return None
    path = Path(checkpoint)
    here = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    with contextlib.suppress(OSError):
        stats = [(str(file), os.stat(file)) for file in here]
        return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats) or None
    return None
