"""Dataclasses to plain dictionaries and back, strictly."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from tinyflux.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` if a valid name is close to ``name``, else an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` to the torch dtype."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(
            f"unknown dtype '{name}'{nearest(name, dtypes)}: choose one of {', '.join(dtypes)}"
        )
    return dtypes[name]


def to_dict(value: Any) -> Any:
    """``value`` as JSON-able data: dataclasses to dicts, tuples to lists, dtypes to names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return value


def from_dict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build dataclass ``cls`` from what :func:`to_dict` gave.

    Args:
        where: what the data is, for messages, such as ``"runs/a/config.json"``.

    Raises:
        ConfigError: a key that ``cls`` has not, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must hold a mapping of names to values, not {data!r:.60}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ConfigError(f"{where} has an unknown key '{key}'{nearest(key, names)}")
    return cls(**{key: _cast(value, hints[key], f"{where}: {key}") for key, value in data.items()})


def _cast(value: Any, hint: Any, where: str) -> Any:
    """``value`` from JSON as the kind of thing that ``hint`` asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        if len(kinds) == 1:
            return _cast(value, kinds[0], where)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"{where} must be {names}, not {value!r:.60}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if hint is torch.dtype:
        return value if isinstance(value, torch.dtype) else parse_dtype(value)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {value!r:.60}")
        if origin is tuple and args and args[-1] is not ... and len(args) == len(value):
            hints = list(args)
        else:
            hints = [args[0] if args else Any] * len(value)
        return origin(_cast(item, kind, where) for item, kind in zip(value, hints, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must map names to values, not {value!r:.60}")
        return {key: _cast(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, not {value!r:.60}")
    return value
