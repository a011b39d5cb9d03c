"""The student that draws, from this machine, the hub or a URL."""

import contextlib
import os
import posixpath
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch

from tinyflux.errors import StorageError
from tinyflux.model.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    is_adapter,
    read_adapter,
)
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.files import CONFIG_NAME, WEIGHTS_NAME
from tinyflux.model.loader import base_of, each_tensor, load_config_of, load_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import fingerprint_of
from tinyflux.storage.copies import fetch
from tinyflux.storage.remote import RemoteFolder
from tinyflux.util.urls import is_url

SUFFIXES = (".safetensors", ".pt")
# What a student's weights are in: its own file, or an adapter's.
STUDENT_FILES = (WEIGHTS_NAME, ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def load_student(
    checkpoint: str, device: str, dtype: torch.dtype, adapters: Mapping[str, str] | None = None
) -> TinyFluxDeep:
    """:func:`~tinyflux.model.loader.load_model`, which a URL may be given to as well.

    Args:
        adapters: by the names that rows of a batch are drawn with; paths, repositories or URLs.

    Raises:
        TinyFluxError: it cannot be fetched or opened.
    """
    if adapters:
        here = {name: _fetched(place) for name, place in adapters.items()}
        return load_model(_fetched(checkpoint), device=device, dtype=dtype, adapter=here)
    base, adapter = _base_and_adapter(checkpoint)
    return load_model(
        base, device=device, dtype=dtype, adapter=None if adapter is None else adapter.place
    )


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
    base, adapter = _base_and_adapter(checkpoint)
    tensors = {} if adapter is None else adapter.tensors
    return fingerprint_of(chain(each_tensor(base), sorted(tensors.items())))


def _base_and_adapter(checkpoint: str) -> tuple[str, Adapter | None]:
    """The student's weights on this machine, and the adapter on them where it is one."""
    here = _fetched(checkpoint)
    if not is_adapter(here):
        return here, None
    adapter = read_adapter(here)
    return _fetched(base_of(adapter)), adapter


def _fetched(checkpoint: str) -> str:
    """A checkpoint on this machine; at a URL it may be a directory or a file of weights."""
    if not is_url(checkpoint):
        return checkpoint
    path, *options = checkpoint.partition("?")
    if not path.endswith(SUFFIXES):
        return fetch(checkpoint, (*STUDENT_FILES, CONFIG_NAME))
    folder, name = posixpath.split(path)
    return os.path.join(fetch("".join([folder, *options]), (name, CONFIG_NAME)), name)


def signature(checkpoint: str) -> tuple[tuple[str, int, int], ...] | None:
    """What changes when a checkpoint is replaced; None where there is none, or none can be seen."""
    if is_url(checkpoint):
        with contextlib.suppress(StorageError):
            files = RemoteFolder(checkpoint).infos()
            return tuple((name, info.mtime_ns, info.size) for name, info in files.items()
                         if name in STUDENT_FILES) or None  # fmt: skip
        return None
    path = Path(checkpoint)
    here = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    with contextlib.suppress(OSError):
        stats = [(str(file), os.stat(file)) for file in here]
        return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats) or None
    return None
