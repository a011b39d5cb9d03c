"""Adapters: LoRA and DoRA of the library peft, on a student's linear layers.

A layer with an adapter keeps its weights, under the name ``<layer>.base_layer.weight``, and adds
what the adapter says to its output. Nothing is merged. On disk an adapter is a directory as peft
writes it::

    adapter_config.json          its kind and sizes, and the weights that it was trained on
    adapter_model.safetensors    its tensors

peft is imported where it is used, because that takes seconds.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.files import WEIGHTS_NAME, locate
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import check_tensors
from tinyflux.util.files import atomic_write
from tinyflux.util.seeding import generator
from tinyflux.util.text import first_line

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # of the adapter that is trained, as peft calls it
# In front of the names of adapters that are asked for by name: peft's layers have attributes.
_SERVED = "adapter_"
_PREFIX = "base_model.model."  # in front of each tensor's name in peft's files
_BASE_FINGERPRINT = "base_fingerprint"  # in the config's auto_mapping, which is free for libraries
# What of peft's LoraConfig makes the layers that are understood here.
_UNDERSTOOD = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
    "base_model_name_or_path", "revision", "auto_mapping",
)  # fmt: skip
# What says nothing of the layers: the first weights are not used, as the file has others.
_IGNORED = (
    "peft_type", "task_type", "peft_version", "inference_mode", "init_lora_weights", "loftq_config",
)  # fmt: skip


@dataclass(frozen=True)
class BaseWeights:
    """The weights that an adapter is trained on.

    Attributes:
        name: what ``load_model`` opens; empty if nobody said.
        fingerprint: of :func:`~tinyflux.model.weights.fingerprint`; empty if nobody took it.
    """

    name: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        place: where it was; names it in errors.
        config: peft's; tensors: by their names in peft's file.
    """

    place: str
    config: "LoraConfig"
    tensors: dict[str, Tensor]

    @property
    def base(self) -> BaseWeights:
        """What it was trained on."""
        return _base_in(self.config)


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` is a directory with an adapter and no whole student."""
    path = Path(source)
    return (path / ADAPTER_CONFIG).is_file() and not (path / WEIGHTS_NAME).is_file()


def has_adapter(model: nn.Module) -> bool:
    """Whether a model's layers have adapters."""
    return hasattr(model, "peft_config")


def served_key(name: str) -> str:
    """What peft's layers call the adapter that is asked for as ``name``."""
    return _SERVED + name


def named_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that rows of a batch can be drawn with; see ``load_model``."""
    keys = getattr(model, "peft_config", {})
    return [key.removeprefix(_SERVED) for key in keys if key.startswith(_SERVED)]


def add_adapter(
    model: TinyFluxDeep,
    kind: str,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    seed: int,
    base: BaseWeights,
) -> None:
    """Give ``model`` a new adapter, which changes nothing yet, and freeze all else.

    Args:
        kind: ``"lora"`` or ``"dora"``.
        target_modules: names, or ends of names, of linear layers.
        seed: of the adapter's first weights, which do not depend on the device.
        base: what ``model`` is, for the adapter's file.

    Raises:
        ConfigError: there are no such layers.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_dora=kind == "dora",
        base_model_name_or_path=base.name or None,
    )
    config.auto_mapping = {
        "base_model_class": TinyFluxDeep.__name__,
        "parent_library": TinyFluxDeep.__module__,
        _BASE_FINGERPRINT: base.fingerprint,
    }
    try:
        _inject(model, config, NAME)
    except ValueError as error:
        raise ConfigError(
            f"trainer.adapter.target_modules {list(target_modules)} cannot have an adapter: "
            f"{first_line(error):.200}"
        ) from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".lora_A.{NAME}." in name:
                # As peft draws them; the other matrix is zero.
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, 5**0.5, generator=generator(seed, "adapter", name))
                parameter.copy_(drawn)


def put_adapter(model: TinyFluxDeep, adapter: Adapter, name: str = NAME) -> None:
    """Put an adapter that was opened on ``model``'s layers, under ``name``.

    Raises:
        CheckpointError: it is made for another model.
    """
    tensors = {_inner_name(key, name): tensor for key, tensor in adapter.tensors.items()}
    # Before layers are made, whose size the config says.
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}
    rank = max([adapter.config.r, *adapter.config.rank_pattern.values()])
    if rank not in ranks:
        raise CheckpointError(
            f"the adapter '{adapter.place}' is damaged: its {ADAPTER_CONFIG} says rank {rank}, and "
            f"its matrices have {', '.join(map(str, sorted(ranks))) or 'none'}"
        )
    try:
        _inject(model, adapter.config, name)
    except ValueError as error:
        raise CheckpointError(
            f"the adapter '{adapter.place}' does not fit the model: {first_line(error):.200}"
        ) from error
    expected = adapter_tensors(model.state_dict(), name)
    check_tensors(expected, tensors, f"the adapter '{adapter.place}'")
    model.load_state_dict(tensors, strict=False)


def _inject(model: TinyFluxDeep, config: "LoraConfig", name: str) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # Several on one student are meant.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, model, name)


def adapter_tensors(tensors: Mapping[str, Tensor], name: str = NAME) -> dict[str, Tensor]:
    """Those of a student's ``tensors`` that are the adapter's."""
    return {key: tensor for key, tensor in tensors.items() if _is_of(key, name)}


def _is_of(key: str, name: str) -> bool:
    return re.search(rf"\.lora_\w+\.{re.escape(name)}\.", key) is not None


def _outer_name(key: str, name: str = NAME) -> str:
    """A tensor's name in peft's file; DoRA's vectors have no ``.weight`` there."""
    key = re.sub(rf"\.(lora_\w+)\.{re.escape(name)}\.", r".\1.", key)
    return _PREFIX + re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", key)


def _inner_name(key: str, name: str = NAME) -> str:
    """Inverse of :func:`_outer_name`; a model may have been saved without peft's wrapper."""
    key = re.sub(r"(\.lora_magnitude_vector)$", r"\1.weight", key.removeprefix(_PREFIX))
    return re.sub(r"\.(lora_\w+)\.", rf".\1.{name}.", key)


def save_adapter(
    model: TinyFluxDeep,
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapter that ``model`` was given by :func:`add_adapter`, as peft reads it.

    Args:
        tensors: the student's tensors instead of the model's own, by the same names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_tensors(model.state_dict() if tensors is None else tensors)
    whole = {_outer_name(key): value.detach().cpu().contiguous() for key, value in state.items()}
    config = {**_config_of(model).to_dict(), "inference_mode": True}
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    atomic_write(directory / ADAPTER_CONFIG, (json.dumps(plain, indent=2) + "\n").encode())
    atomic_write(directory / ADAPTER_WEIGHTS, save(whole, metadata={"format": "pt"}))
    return directory


def trained_on(model: TinyFluxDeep) -> BaseWeights:
    """The weights of a ``model`` that was given an adapter by :func:`add_adapter`."""
    return _base_in(_config_of(model))


def _base_in(config: "LoraConfig") -> BaseWeights:
    mapping = config.auto_mapping or {}
    name = config.base_model_name_or_path or ""
    return BaseWeights(name, str(mapping.get(_BASE_FINGERPRINT, "")))


def _config_of(model: TinyFluxDeep) -> "LoraConfig":
    configs: Any = model.peft_config
    config: LoraConfig = configs[NAME]
    return config


def read_adapter(source: str | os.PathLike[str]) -> Adapter:
    """The adapter in a directory or a hub repository ``user/repo`` or ``user/repo:subfolder``.

    Raises:
        CheckpointError: there is none, it is damaged, or of a kind that is not understood.
        HubError: a repository that cannot be fetched.
    """
    place = os.fspath(source)
    config = _read_config(locate(place, ADAPTER_CONFIG), place)
    return Adapter(place, config, read_adapter_file(locate(place, ADAPTER_WEIGHTS)))


def read_adapter_file(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in peft's file; CheckpointError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' is not an adapter that can be read: {first_line(error):.200}"
        ) from error


def read_adapter_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's file by their names in a student that trains it."""
    return {_inner_name(key): tensor for key, tensor in read_adapter_file(path).items()}


def _read_config(path: Path, place: str) -> "LoraConfig":
    from peft import LoraConfig

    try:
        data = json.loads(path.read_bytes())
        kind = data.get("peft_type")
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is not an adapter's config: {error}") from error
    if kind != "LORA":
        raise CheckpointError(
            f"the adapter '{place}' is of peft's kind '{kind}': LoRA and DoRA can be opened"
        )
    default = LoraConfig().to_dict()
    foreign = [
        key
        for key, value in data.items()
        if key not in (*_UNDERSTOOD, *_IGNORED) and value and value != default.get(key)
    ]
    if foreign:
        raise CheckpointError(
            f"the adapter '{place}' uses peft's {', '.join(foreign[:3])}, which is more than LoRA "
            "and DoRA on linear layers"
        )
    try:
        config = LoraConfig(**{key: data[key] for key in _UNDERSTOOD if key in data})
        config.rank_pattern, config.alpha_pattern = (
            dict(config.rank_pattern or {}), dict(config.alpha_pattern or {}),
        )  # fmt: skip
        if not all(isinstance(rank, int) for rank in (config.r, *config.rank_pattern.values())):
            raise ValueError(f"r is {config.r!r}")
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"'{path}' is not an adapter's config: {first_line(error):.200}"
        ) from error
    return config


def merge_adapters(model: TinyFluxDeep) -> None:
    """Add what a student's adapters say to its weights, and take them off.

    For whoever must do without peft; the sums are rounded to the weights' precision.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
