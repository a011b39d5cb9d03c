"""The student that draws, from this machine, the hub or a URL."""

import contextlib
import hashlib
import os
import posixpath
from pathlib import Path

import torch

from tinyflux.errors import StorageError
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.loader import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    each_tensor,
    load_config_of,
    load_model,
)
from tinyflux.model.model import TinyFluxDeep
from tinyflux.storage.copies import fetch
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.urls import is_url

SUFFIXES = (".safetensors", ".pt")


def load_student(checkpoint: str, device: str, dtype: torch.dtype) -> TinyFluxDeep:
    """:func:`~tinyflux.model.loader.load_model`, which a URL may be given to as well.

    Raises:
        TinyFluxError: it cannot be fetched or opened.
    """
    return load_model(_fetched(checkpoint), device=device, dtype=dtype)


def student_config(checkpoint: str) -> TinyFluxConfig:
    """The config of :func:`load_student`'s model; no weights are opened.

    Raises:
        TinyFluxError: it cannot be fetched or opened.
    """
    return load_config_of(_fetched(checkpoint))


def weights_fingerprint(checkpoint: str) -> str:
    """What tells a student's weights from others; a tensor at a time is in memory.

    Raises:
        TinyFluxError: it cannot be fetched or read.
    """
    total = hashlib.sha256()
    for name, tensor in each_tensor(_fetched(checkpoint)):
        total.update(name.encode())
        total.update(tensor.float().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _fetched(checkpoint: str) -> str:
    """A checkpoint on this machine; at a URL it may be a directory or a file of weights."""
    if not is_url(checkpoint):
        return checkpoint
    path, *options = checkpoint.partition("?")
    if not path.endswith(SUFFIXES):
        return fetch(checkpoint, (WEIGHTS_NAME, CONFIG_NAME))
    folder, name = posixpath.split(path)
    return os.path.join(fetch("".join([folder, *options]), (name, CONFIG_NAME)), name)


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
