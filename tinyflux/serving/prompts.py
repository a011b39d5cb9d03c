"""Prompts as the model reads them, each encoded once."""

from collections import OrderedDict

import torch

from tinyflux.model.guidance import TextCondition
from tinyflux.trainer.sampling import Encoders


class PromptCache:
    """Text conditions of the prompts used last; for one thread, its length for any.

    Args:
        size: prompts kept.
        device, dtype: of the conditions.
    """

    def __init__(self, zoo: Encoders, size: int, device: torch.device, dtype: torch.dtype):
        self._zoo, self._size = zoo, size
        self._device, self._dtype = device, dtype
        self._kept: OrderedDict[str, TextCondition] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, prompt: str) -> TextCondition:
        """The condition of one prompt, ``[1, L, D]`` and ``[1, P]``; empty is the null caption.

        Raises:
            InputError: the prompt has too many tokens.
        """
        found = self._kept.pop(prompt, None)
        if found is None:
            t5, pooled = self._zoo.encode_prompts_batched([prompt], allow_empty=not prompt.strip())
            found = TextCondition(
                t5.to(self._device, self._dtype), pooled.to(self._device, self._dtype)
            )
        self._kept[prompt] = found
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return found
