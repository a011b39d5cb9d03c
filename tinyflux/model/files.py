"""The files of a student, and where they are on this machine."""

from pathlib import Path

from huggingface_hub import hf_hub_download

from tinyflux.errors import CheckpointError, HubError
from tinyflux.util.text import first_line

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


def locate(source: str, name: str) -> Path:
    """The file ``name`` of a model's directory or hub repository on this machine, or ``source``.

    Raises:
        CheckpointError: there is no such file.
        HubError: a repository that cannot be fetched.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / name).is_file():
            return path / name
        raise CheckpointError(f"the directory '{source}' holds no {name}")
    repo, _, subfolder = source.partition(":")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")) or path.suffix in (".pt", ".json"):
        raise CheckpointError(f"there is no checkpoint at '{source}': check the path")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"there is no checkpoint at '{source}': check the path")
    try:
        return Path(hf_hub_download(repo, name, subfolder=subfolder or None))
    except Exception as error:  # hub, network and validation errors have no common base
        raise HubError(
            f"there is no '{source}' on this machine, and {name} cannot be fetched from the hub "
            f"repository '{repo}' (is the network reachable?): {first_line(error):.200}"
        ) from error
