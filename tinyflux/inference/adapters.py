"""Rows of one batch drawn with different adapters."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from tinyflux.model.adapters import named_adapters, served_key
from tinyflux.model.model import TinyFluxDeep

_NO_ADAPTER = "__base__"  # peft's word in a list of adapters


@contextmanager
def drawn_with(model: TinyFluxDeep, adapters: Sequence[str | None]) -> Iterator[None]:
    """Within it, row i of a forward goes through ``adapters[i]``; None is the student alone.

    Every row's own product with the student's weights is that of a batch without adapters. Of a
    model that was opened without adapters by name nothing changes.
    """
    if not named_adapters(model):
        yield
        return
    from peft.tuners.lora import LoraLayer

    rows = [_NO_ADAPTER if name is None else served_key(name) for name in adapters]

    def say(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": rows}

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                stack.enter_context(module.register_forward_pre_hook(say, with_kwargs=True))
        yield
