"""Frozen models from hub repositories or local directories, each failure one sentence."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from tinyflux.errors import HubError
from tinyflux.util.text import first_line

if TYPE_CHECKING:  # each takes seconds to import: only who opens a model waits for it
    from diffusers import AutoencoderKL, UNet2DConditionModel

# Stable Diffusion 1.5's UNet, whose single-file checkpoints come without a config.
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def open_pretrained(
    cls: Any, repo: str, subfolder: str = "", dtype: torch.dtype | None = None
) -> Any:
    """``cls.from_pretrained`` with one clear sentence when it cannot be opened."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    place = f"{repo}/{subfolder}" if subfolder else repo
    local = os.path.isdir(repo)
    _check_directory(cls, repo, local)
    options: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if dtype is not None:
        options["dtype" if issubclass(cls, PreTrainedModel) else "torch_dtype"] = dtype
    if issubclass(cls, PreTrainedModel | ModelMixin):
        options["use_safetensors"] = True  # a pickle can run anything as it is opened
    with _one_sentence(cls, place, local):
        return cls.from_pretrained(repo, **options)


def _check_directory(cls: Any, repo: str, local: bool) -> None:
    if not local and _looks_local(repo):
        raise HubError(
            f"there is no directory '{repo}' to load {cls.__name__} from: check the path"
        )


@contextmanager
def _one_sentence(cls: Any, place: str, local: bool) -> Iterator[None]:
    """Within it, what the libraries raise about ``place`` is a HubError of one sentence."""
    try:
        yield
    except Exception as error:  # the libraries raise OSError, ValueError and hub errors alike
        kind = "directory" if local else "hub repository (is the network reachable?)"
        raise HubError(
            f"{cls.__name__} cannot be loaded from '{place}', a {kind}: {first_line(error):.200}"
        ) from error


def _looks_local(repo: str) -> bool:
    return repo.startswith((".", "/", "~")) or repo.count("/") != 1


def open_vae(repo: str, dtype: torch.dtype) -> "AutoencoderKL":
    """A VAE, at the repository's root or in ``vae/``."""
    from diffusers import AutoencoderKL

    return open_pretrained(AutoencoderKL, repo, _vae_folder(repo), dtype)


def open_vae_config(repo: str) -> Mapping[str, Any]:
    """The config of :func:`open_vae`'s VAE, without its weights.

    Raises:
        HubError: there is none, or it cannot be read.
    """
    from diffusers import AutoencoderKL

    local = os.path.isdir(repo)
    _check_directory(AutoencoderKL, repo, local)
    with _one_sentence(AutoencoderKL, repo, local):
        config: dict[str, Any] = AutoencoderKL.load_config(repo, subfolder=_vae_folder(repo))
        return config


def _vae_folder(repo: str) -> str:
    at_root = os.path.isfile(os.path.join(repo, "config.json"))
    return "" if at_root else "vae"


def open_teacher(
    repo: str, folder: str, filename: str, dtype: torch.dtype
) -> "UNet2DConditionModel":
    """A teacher: folder ``folder`` of the repository, or its file ``filename``."""
    from diffusers import UNet2DConditionModel

    if os.path.isfile(os.path.join(repo, folder, "config.json")):
        return open_pretrained(UNet2DConditionModel, repo, folder, dtype)
    if os.path.isdir(repo):
        path = Path(repo) / filename
        if not path.is_file():
            raise HubError(f"'{repo}' holds neither a folder '{folder}' nor the file '{filename}'")
    elif _looks_local(repo):
        raise HubError(f"there is no directory '{repo}' to load the teacher {folder} from")
    else:
        try:
            path = Path(hf_hub_download(repo, filename))
        except Exception as error:
            raise HubError(
                f"'{filename}' cannot be fetched from the hub repository '{repo}' (is the network "
                f"reachable?): {first_line(error):.200}"
            ) from error
    beside = path.with_name("config.json")
    config = UNet2DConditionModel.load_config(str(beside)) if beside.is_file() else SD15_UNET
    unet = UNet2DConditionModel.from_config(config)
    try:
        unet.load_state_dict(load_file(path))
    except Exception as error:
        raise HubError(f"'{path}' is not a {folder} teacher: {str(error)[:200]}") from error
    return unet.to(dtype)
