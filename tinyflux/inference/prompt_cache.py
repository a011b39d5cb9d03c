"""Prompts as the model reads them, each encoded once."""

from collections import OrderedDict
from typing import Any, NamedTuple, Protocol

import torch

from tinyflux.inference.guidance import TextCondition
from tinyflux.model.text import CutTokens


class PromptEncoders(Protocol):
    """What the cache needs of a ModelZoo."""

    def encode_prompts_batched(self, prompts: list[str], *args: Any, **kwargs: Any) -> Any: ...

    def cut_tokens(self, prompts: list[str]) -> list[CutTokens]: ...


class EncodedPrompt(NamedTuple):
    """What the model gets of one prompt: ``[1, L, D]`` and ``[1, P]``, and what is left out."""

    condition: TextCondition
    cut: CutTokens


class PromptCache:
    """The prompts used last, encoded; for one thread, its length for any.

    Args:
        size: prompts kept.
        device, dtype: of the conditions.
    """

    def __init__(self, zoo: PromptEncoders, size: int, device: torch.device, dtype: torch.dtype):
        self._zoo, self._size = zoo, size
        self._device, self._dtype = device, dtype
        self._kept: OrderedDict[str, EncodedPrompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, prompt: str) -> EncodedPrompt:
        """One prompt encoded; an empty one is the null caption."""
        encoded = self._kept.pop(prompt, None) or self._encode(prompt)
        self._kept[prompt] = encoded
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return encoded

    def _encode(self, prompt: str) -> EncodedPrompt:
        empty = not prompt.strip()
        # Who asked is told what is cut; a log would tell those who did not.
        t5, pooled = self._zoo.encode_prompts_batched([prompt], allow_empty=empty, warn_cut=False)
        condition = TextCondition(
            t5.to(self._device, self._dtype), pooled.to(self._device, self._dtype)
        )
        return EncodedPrompt(condition, *self._zoo.cut_tokens([prompt]))
