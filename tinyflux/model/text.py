"""Texts as the encoders' tokens, and what the student reads of T5."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinyflux.model.layers import rms_norm

if TYPE_CHECKING:  # whoever only counts tokens loads no library of the encoders
    from transformers import T5EncoderModel


class CutTokens(NamedTuple):
    """How many tokens of a text are beyond what each encoder reads; 0 where it is read whole."""

    clip: int
    t5: int


READ_WHOLE = CutTokens(0, 0)

# T5 ``[L, D]`` and pooled CLIP ``[P]`` embeddings of the empty caption.
NullText = tuple[Tensor, Tensor]
# Relative distance of embeddings: those of one encoder in bf16 and fp32 are 0.006 apart, those of
# encoders with other weights more than 1.
_SAME_WITHIN = 0.05


class Tokens(NamedTuple):
    """Texts as an encoder reads them.

    Attributes:
        ids, mask: ``[B, limit]``; the mask is 1 for those that are no padding.
        cut: ``[B]``; tokens of each text that are left out.
    """

    ids: Tensor
    mask: Tensor
    cut: Tensor


def tokenize(tokenizer: Any, texts: Sequence[str], limit: int) -> Tokens:
    """Texts as ``limit`` tokens each: padded, or cut before their end token, as FLUX does."""
    options = {"padding": "max_length", "max_length": limit, "verbose": False}
    encoded = tokenizer(list(texts), **options)
    cut = [len(ids) - limit for ids in encoded.input_ids]  # padded, so never below 0
    if any(cut):
        encoded = tokenizer(list(texts), truncation=True, **options)
    ids, mask = torch.tensor(encoded.input_ids), torch.tensor(encoded.attention_mask)
    return Tokens(ids, mask, torch.tensor(cut))


def t5_embeddings(
    encoder: "T5EncoderModel", ids: Tensor, mask: Tensor, layers: Sequence[int], padding: str
) -> Tensor:
    """The mean of the RMS-normalised hidden states of ``layers``, ``[B, L, D]``.

    The last layer alone is taken as it is.

    Args:
        ids, mask: ``[B, L]`` tokens, and 1 for those that are no padding.
        padding: ``"zero"`` makes padding's embeddings zero.
    """
    output = encoder(ids, attention_mask=mask, output_hidden_states=True)
    if tuple(layers) == (encoder.config.num_layers,):
        text: Tensor = output.last_hidden_state
    else:
        text = torch.stack([rms_norm(output.hidden_states[layer]) for layer in layers]).mean(0)
    return text * mask[..., None] if padding == "zero" else text


def same_null_text(one: NullText, other: NullText) -> bool:
    """Whether two empty captions were embedded by the same encoders, up to their precision."""
    return all(map(_near, one, other))


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float().cpu(), other.float().cpu()
    return bool((one - other).norm() <= _SAME_WITHIN * torch.maximum(one.norm(), other.norm()))
