"""What the models of a build are, told by their weights; and remembering it between builds."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tinyflux.cache.extract import Extractor
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.keys import digest_of
from tinyflux.cache.manifest import MODEL_SETTINGS, FileInfo, Recipe
from tinyflux.cache.shards import is_whole, write_null_text
from tinyflux.errors import ConfigError
from tinyflux.util.config import from_dict, to_dict

FINGERPRINTS_NAME = "makers.json"


@dataclass(frozen=True)
class ModelFingerprints:
    """What the models are: their recipe, and the file of the empty caption's embedding."""

    recipe: Recipe
    null_text: FileInfo


def take_fingerprints(configs: BuildConfigs, extractor: Extractor) -> ModelFingerprints:
    """Load the models, name them by their weights, and encode the empty caption."""
    recipe = extractor.recipe(mask=bool(configs.data.mask_key))
    path = f"null_text.{recipe.groups['text'].fingerprint[:8]}.safetensors"
    return ModelFingerprints(recipe, write_null_text(configs.store, *extractor.null_text(), path))


def known_fingerprints(configs: BuildConfigs) -> ModelFingerprints | None:
    """What an earlier run found out about these models, unless their files have changed."""
    try:
        record = json.loads(configs.store.read(FINGERPRINTS_NAME))
        signature = _signature(configs)
        if signature is None or record.pop("signature") != signature:
            return None
        known = from_dict(ModelFingerprints, record, FINGERPRINTS_NAME)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return known if is_whole(configs.store, known.null_text) else None


def keep_fingerprints(configs: BuildConfigs, known: ModelFingerprints) -> None:
    """Remember them for :func:`known_fingerprints`, if it could tell a change of the models."""
    if (signature := _signature(configs)) is not None:
        record = {"signature": signature, **to_dict(known)}
        configs.store.write(FINGERPRINTS_NAME, json.dumps(record, indent=1).encode())


def _signature(configs: BuildConfigs) -> str | None:
    """Changes when the weights may have; None for models of the hub, which can change any time."""
    zoo = configs.zoo
    files = []
    for repo in {zoo.vae_repo, zoo.t5_repo, zoo.clip_repo, zoo.experts_repo, zoo.sd_repo}:
        if not os.path.isdir(repo):
            return None
        for path in sorted(Path(repo).rglob("*")):
            if path.is_file():
                state = path.stat()
                files.append([str(path), state.st_size, state.st_mtime_ns])
    settings = {**to_dict(configs.cache), **to_dict(configs.model)}
    chosen = [*("extract_lune", "extract_sol", "seed"), *MODEL_SETTINGS]
    made_with = {name: settings[name] for name in chosen}
    return digest_of([sorted(files), made_with, to_dict(zoo), bool(configs.data.mask_key)])
