"""What a run begins with: the weights of another run, or of anything that ``load_model`` opens."""

import json
import logging
import posixpath
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tinyflux import run_dir as names
from tinyflux.errors import CheckpointError, ConfigError, DamagedCheckpointError, StorageError
from tinyflux.model.adapters import ADAPTER_WEIGHTS
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.files import CONFIG_NAME, WEIGHTS_NAME, locate
from tinyflux.model.loader import each_tensor, load_config
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.patches import carry_patches
from tinyflux.model.weights import check_tensors
from tinyflux.storage.folder import Folder, LocalFolder
from tinyflux.trainer.checkpoint_search import checkpoints_by_step
from tinyflux.trainer.checkpoint_state import parse_state
from tinyflux.util.files import file_sha256
from tinyflux.util.urls import is_url, join

SUFFIXES = (".safetensors", ".pt")
# What a student's inputs mean, which no shape tells of.
MEANINGS = ("t5_layers", "text_padding", "latent_shift", "time_scale")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, wherever it is.

    Attributes:
        place: its folder, a path or URL; without ``name`` a file or a hub repository.
        name: of the file in ``place``.
        sha256: that was recorded when it was written; empty if none was.
    """

    place: str
    name: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return join(self.place, self.name) if self.name else self.place

    def to_json(self) -> str:
        """For :meth:`from_json` of another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "WeightsFile":
        """Inverse of :meth:`to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class FirstWeights:
    """What a run began with, as its checkpoints tell.

    Attributes:
        source: where the weights were.
        sha256: of their file.
    """

    source: str
    sha256: str


class Places(Protocol):
    """Where weights may lie; the jobs on Ray know URLs, too."""

    def open(self, place: str) -> Folder:
        """The folder at ``place``."""
        ...

    def fetch(self, place: str, files: tuple[str, ...]) -> str:
        """The folder at ``place`` as a directory of this machine, with those of ``files``."""
        ...


class ThisMachine:
    """Directories of this machine."""

    def open(self, place: str) -> Folder:
        """See :meth:`Places.open`; ConfigError for a URL."""
        if is_url(place):
            raise ConfigError(
                f"trainer.init_from '{place}' is a URL, which the library's Trainer does not open: "
                "fetch it first, or train with `tinyflux train`"
            )
        return LocalFolder(place)

    def fetch(self, place: str, files: tuple[str, ...]) -> str:
        """See :meth:`Places.fetch`."""
        return place


def find_weights(source: str, averaged: bool, places: Places) -> WeightsFile:
    """The file of weights that ``source`` means.

    Args:
        source: a checkpoint, a run's directory (its result, or its newest checkpoint where it has
            none), a directory of ``load_model``, or a file; a path or a URL of any of these; or a
            hub repository ``user/repo`` or ``user/repo:subfolder``.
        averaged: the EMA's weights, where there are both.

    Raises:
        TinyFluxError: there are none.
    """
    if not is_url(source) and not Path(source).is_dir():
        return WeightsFile(source)
    path, *options = source.partition("?")
    if is_url(source) and path.endswith(SUFFIXES):
        folder, name = posixpath.split(path)
        return WeightsFile("".join([folder, *options]), name)
    found = _in_folder(places, source, averaged)
    if found is None:
        raise CheckpointError(
            f"trainer.init_from '{source}' holds no weights: name a checkpoint, a run's directory, "
            f"a directory with {WEIGHTS_NAME}, or a file"
        )
    return found


def _in_folder(places: Places, place: str, averaged: bool) -> WeightsFile | None:
    """The weights in a folder of any kind, None if it holds none."""
    folder = places.open(place)
    if folder.size(names.CHECKPOINT_STATE) is not None:
        return _of_checkpoint(folder, place, averaged)
    if folder.size(names.FINAL_STATE) is not None:
        return _of_result(folder, place, "", averaged)
    if averaged and folder.size(f"{names.FINAL}/{names.FINAL_STATE}") is not None:
        return _of_result(folder, place, names.FINAL, averaged)
    inside = join(place, names.CHECKPOINTS)
    checkpoints = checkpoints_by_step(places.open(inside))
    if checkpoints:
        newest = join(inside, checkpoints[max(checkpoints)])
        return _of_checkpoint(places.open(newest), newest, averaged)
    if folder.size(WEIGHTS_NAME) is not None:
        return WeightsFile(place, WEIGHTS_NAME)
    return None


def _of_checkpoint(folder: Folder, place: str, averaged: bool) -> WeightsFile:
    _refuse_adapter(folder, place, "")
    state = parse_state(folder.read(names.CHECKPOINT_STATE), join(place, names.CHECKPOINT_STATE))
    name = names.CHECKPOINT_EMA if averaged else WEIGHTS_NAME
    return WeightsFile(place, name, state.files.get(name, ""))


def _of_result(folder: Folder, place: str, below: str, averaged: bool) -> WeightsFile:
    """The weights of a run's ``final/``, which is ``place`` or ``below`` it."""
    if not averaged:
        raise CheckpointError(
            f"trainer.init_from '{place}' holds the EMA alone: for trainer.init_from_ema: false "
            "name a checkpoint or the run's directory"
        )
    _refuse_adapter(folder, place, below)
    path = posixpath.join(below, names.FINAL_STATE)
    try:
        files = json.loads(folder.read(path)).get("files", {})
    except (ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{join(place, path)} cannot be read: {error}") from error
    where = join(place, below) if below else place
    return WeightsFile(where, WEIGHTS_NAME, files.get(WEIGHTS_NAME, ""))


def _refuse_adapter(folder: Folder, place: str, below: str) -> None:
    if folder.size(posixpath.join(below, ADAPTER_WEIGHTS)) is not None:
        raise CheckpointError(
            f"trainer.init_from '{place}' holds an adapter and no student: name the student that "
            "it was trained on"
        )


def begin_from(
    file: WeightsFile, model: TinyFluxDeep, source: str, places: Places, carry: bool = True
) -> FirstWeights:
    """Give ``model`` the weights in ``file``.

    Those of another patch size are carried over (:func:`~tinyflux.model.patches.carry_patches`);
    pictures of another size need nothing.

    Args:
        source: the setting's value, for the record.
        carry: take weights of another patch size; else they do not fit.

    Raises:
        CheckpointError: they are damaged, or do not fit the model.
        TinyFluxError: they cannot be fetched.
    """
    where, path, tensors = _fitting(file, model, places, carry)
    sha256 = file_sha256(path)
    if file.sha256 and sha256 != file.sha256:
        raise DamagedCheckpointError(
            f"trainer.init_from: '{file}' is not as it was written (its SHA-256 is {sha256[:12]}, "
            f"not {file.sha256[:12]}): bring it back, or begin with other weights"
        )
    _check_numbers(tensors, where)
    _warn_of_meanings(path, model.config, where)
    model.load_state_dict(tensors)
    return FirstWeights(source, sha256)


def check_fits(
    file: WeightsFile, outline: TinyFluxDeep, places: Places, carry: bool = True
) -> None:
    """Refuse weights that do not fit a model, which may be on the meta device; TinyFluxError."""
    _fitting(file, outline, places, carry)


def _fitting(
    file: WeightsFile, model: TinyFluxDeep, places: Places, carry: bool
) -> tuple[str, Path, dict[str, Tensor]]:
    """What names the weights in errors, their file, and the tensors as ``model`` wants them."""
    where, path = f"trainer.init_from '{file}'", _fetched(file, places)
    config, tensors = model.config, dict(each_tensor(path))
    if carry:
        tensors = carry_patches(tensors, config.in_channels, config.patch_size, where)
    check_tensors(model.state_dict(), tensors, where)
    return where, path, tensors


def _fetched(file: WeightsFile, places: Places) -> Path:
    """The file on this machine, with the config beside it if there is one."""
    if not file.name:
        return locate(file.place, WEIGHTS_NAME)
    try:
        path = Path(places.fetch(file.place, (file.name, CONFIG_NAME))) / file.name
    except StorageError as error:
        raise CheckpointError(f"trainer.init_from '{file}' cannot be fetched: {error}") from error
    if not path.is_file():
        raise CheckpointError(f"trainer.init_from: there is no '{file}': check the path")
    return path


def _check_numbers(tensors: dict[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DamagedCheckpointError(f"{where} holds numbers that are not finite, in {name}")


def _warn_of_meanings(path: Path, config: TinyFluxConfig, where: str) -> None:
    """Say what the weights' inputs meant and mean no more; a lone file does not tell."""
    beside = path.with_name(CONFIG_NAME)
    if not beside.is_file():
        return
    try:
        former = load_config(beside)
    except (CheckpointError, ConfigError):
        return  # the config of something else: only the tensors count
    changed = [
        f"{name} {getattr(former, name)} (now {getattr(config, name)})"
        for name in MEANINGS
        if getattr(former, name) != getattr(config, name)
    ]
    if changed:
        logger.warning(
            "%s was trained with model.%s: it has to learn again what these inputs mean",
            where, ", ".join(changed),
        )  # fmt: skip
