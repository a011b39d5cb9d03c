"""Students from files, directories and the hub; and back to a directory."""

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.adapters import (
    NAME,
    Adapter,
    is_adapter,
    put_adapter,
    read_adapter,
    served_key,
)
from tinyflux.model.files import CONFIG_NAME, WEIGHTS_NAME, locate
from tinyflux.model.model import UNUSED_PUBLISHED_PREFIXES, TinyFluxConfig, TinyFluxDeep
from tinyflux.model.weights import fingerprint, misfits, plain_name, shapes_of
from tinyflux.util.device import resolve_device
from tinyflux.util.files import atomic_write
from tinyflux.util.text import first_line

# What ``load_model`` puts on a student: an adapter, or several by name.
Adapters = str | os.PathLike[str] | Mapping[str, str] | None

logger = logging.getLogger(__name__)


def load_model(
    source: str | os.PathLike[str],
    config: TinyFluxConfig | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    strict: bool = True,
    adapter: Adapters = None,
) -> TinyFluxDeep:
    """A student in evaluation mode.

    Args:
        source: a ``.safetensors`` or ``.pt`` file, a directory with ``model.safetensors`` and
            ``config.json``, or a hub repository ``user/repo`` or ``user/repo:subfolder``. A
            directory with an adapter and no student is the student that it was trained on, with it.
        config: of the model; None reads the ``config.json`` beside the weights.
        strict: refuse tensors that do not fit; otherwise they are logged and left as initialised.
            And refuse an adapter of other weights; otherwise that is logged.
        adapter: a directory or hub repository with a LoRA or DoRA adapter of the library peft; or
            several of LoRA by name, with which rows of one batch are drawn
            (:func:`~tinyflux.inference.adapters.drawn_with`).

    Raises:
        CheckpointError: no checkpoint there, a broken one, or tensors that do not fit.
        HubError: a repository that cannot be fetched.
    """
    place = resolve_device(device)
    source, opened = _with_base(source, adapter)
    weights = locate(os.fspath(source), WEIGHTS_NAME)
    if config is None:
        config = load_config_of(source)
    tensors = _read(weights)
    if strict:
        _check_depth(config, tensors, str(weights))
    fitting = _fitting(_outline(config, str(weights)), tensors, str(weights), strict)
    model = TinyFluxDeep(config)
    model.load_state_dict(fitting, strict=False)
    if opened:
        found = fingerprint(model.state_dict())
        for one in opened.values():
            _check_base(one, found, os.fspath(source), strict)
        for key, one in opened.items():
            put_adapter(model, one, key)
    return model.to(device=place, dtype=dtype).eval()


def _with_base(
    source: str | os.PathLike[str], adapter: Adapters
) -> tuple[str | os.PathLike[str], dict[str, Adapter]]:
    """What holds the weights, and the adapters on them by what peft's layers call them."""
    if not is_adapter(source):
        if adapter is None:
            return source, {}
        if isinstance(adapter, Mapping):
            named = {served_key(name): read_adapter(place) for name, place in adapter.items()}
            return source, {key: _mixable(one) for key, one in named.items()}
        return source, {NAME: read_adapter(adapter)}
    if adapter:
        raise CheckpointError(
            f"'{source}' holds an adapter alone, on which no other can be put: name the student "
            "that both were trained on"
        )
    opened = read_adapter(source)
    return base_of(opened), {NAME: opened}


def _mixable(adapter: Adapter) -> Adapter:
    """Refuse an adapter that peft does not draw with beside others in one batch."""
    if adapter.config.use_dora:
        raise CheckpointError(
            f"the adapter '{adapter.place}' is DoRA, which peft does not mix with others in one "
            "batch: open it alone, as a student"
        )
    return adapter


def base_of(adapter: Adapter) -> str:
    """What an adapter says that it was trained on.

    Raises:
        CheckpointError: it does not say, or that is not there.
    """
    name = adapter.base.name
    if not name or (name.startswith(("/", ".")) and not Path(name).exists()):
        raise CheckpointError(
            f"the adapter '{adapter.place}' was trained on "
            f"{f'{name!r}, which is not there' if name else 'weights that it does not name'}: "
            "open the student with load_model(student, adapter=...)"
        )
    return name


def _check_base(adapter: Adapter, found: str, source: str, strict: bool) -> None:
    """Refuse weights that an adapter was not trained on, where it says on which."""
    trained_on = adapter.base.fingerprint
    if not trained_on:
        logger.warning("the adapter '%s' does not say which weights it fits", adapter.place)
    elif found != trained_on:
        message = (
            f"the adapter '{adapter.place}' was trained on other weights than those of '{source}' "
            f"(fingerprint {trained_on}, not {found}): open it with "
            f"'{adapter.base.name or 'the student that it was trained on'}'"
        )
        if strict:
            raise CheckpointError(message)
        logger.warning(message)


def load_config_of(source: str | os.PathLike[str]) -> TinyFluxConfig:
    """The config of the student that :func:`load_model` opens at ``source``, without its weights.

    Raises:
        CheckpointError: there is none.
        HubError: a repository that cannot be fetched.
    """
    path = Path(source)
    if not path.exists():
        return load_config(source)
    if is_adapter(path) and not (path / CONFIG_NAME).is_file():  # peft itself writes none
        return load_config_of(base_of(read_adapter(path)))
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if not weights.with_name(CONFIG_NAME).is_file():
        raise CheckpointError(
            f"there is no {CONFIG_NAME} beside '{weights}': pass config=, the config that the "
            f"checkpoint was trained with"
        )
    return load_config(weights.with_name(CONFIG_NAME))


def each_tensor(source: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that :func:`load_model` takes from ``source``, in the order of their names.

    One at a time is in memory, but for a ``.pt`` file.

    Raises:
        CheckpointError: no checkpoint there, or a broken one.
        HubError: a repository that cannot be fetched.
    """
    path = locate(os.fspath(source), WEIGHTS_NAME)
    if path.suffix == ".pt":
        read = _read(path)
        yield from _in_order({name: name for name in read}, read.__getitem__)
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = {plain_name(name): name for name in file.keys()}  # noqa: SIM118
            yield from _in_order(names, file.get_tensor)
    except SafetensorError as error:
        raise CheckpointError(
            f"'{path}' is not a checkpoint that can be read: {first_line(error):.200}"
        ) from error


def _in_order(
    names: Mapping[str, str], tensor_of: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for plain in sorted(names):
        if not plain.startswith(UNUSED_PUBLISHED_PREFIXES):
            yield plain, tensor_of(names[plain])


def load_config(source: str | os.PathLike[str]) -> TinyFluxConfig:
    """A config from a JSON file, a directory with ``config.json`` or a hub repository.

    Raises:
        ConfigError: an unknown key or an impossible value.
        CheckpointError: there is none, or it is not JSON.
    """
    path = locate(os.fspath(source), CONFIG_NAME)
    try:
        data = json.loads(path.read_bytes())
    except RecursionError as error:
        raise CheckpointError(f"'{path}' is nested without end: it is no config") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' must hold an object of settings")
    return TinyFluxConfig.from_dict(data, f"'{path}'")


def save_model(
    model: TinyFluxDeep,
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``config.json``, which :func:`load_model` opens.

    Args:
        tensors: weights instead of the model's own, by the same names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = tensors if tensors is not None else model.state_dict()
    whole = {plain_name(name): value.detach().cpu().contiguous() for name, value in state.items()}
    save_config(model, directory)
    atomic_write(directory / WEIGHTS_NAME, save(whole))
    return directory


def save_config(model: TinyFluxDeep, directory: str | os.PathLike[str]) -> None:
    """Write ``config.json``, which :func:`load_config` reads."""
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    atomic_write(Path(directory) / CONFIG_NAME, config.encode())


def _read(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without what wrappers put in front."""
    try:
        if path.suffix == ".pt":
            data = torch.load(path, map_location="cpu", weights_only=True)
        else:
            data = load_file(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is not a checkpoint that can be read: {first_line(error):.200}"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise CheckpointError(f"'{path}' does not hold tensors by name")
    return {plain_name(name): tensor for name, tensor in data.items()}


def _check_depth(config: TinyFluxConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a config of more layers than the file has tensors before a model of it is built."""
    layers = config.num_double_layers + config.num_single_layers
    if layers > len(tensors):
        raise CheckpointError(
            f"'{where}' does not fit the model's config: it holds {len(tensors)} tensors, which "
            f"cannot be {layers} layers"
        )


def _outline(config: TinyFluxConfig, where: str) -> Mapping[str, Tensor]:
    """Names and shapes of the tensors of a config's model, which take no memory."""
    try:
        with torch.device("meta"):
            return TinyFluxDeep(config).state_dict()
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"no model can be built of the config of '{where}': {first_line(error):.200}"
        ) from error


def _fitting(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, strict: bool
) -> dict[str, Tensor]:
    """What of ``tensors`` fits the model's ``own``; all must, and be all, unless not ``strict``."""
    given = {k: v for k, v in tensors.items() if not k.startswith(UNUSED_PUBLISHED_PREFIXES)}
    problems = misfits(shapes_of(own), given)
    if problems and strict:
        raise CheckpointError(f"'{where}' does not fit the model's config: {problems}")
    if problems:
        logger.warning("'%s' fits in part: skipped %s", where, problems)
    return {k: v for k, v in given.items() if k in own and k not in problems.misshaped}
