"""What the student reads of T5."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import T5EncoderModel

from tinyflux.model.layers import rms_norm


def t5_embeddings(
    encoder: T5EncoderModel, ids: Tensor, mask: Tensor, layers: Sequence[int], padding: str
) -> Tensor:
    """The mean of the RMS-normalised hidden states of ``layers``, ``[B, L, D]``.

    The last layer alone is taken as it is.

    Args:
        ids, mask: ``[B, L]`` tokens, and 1 for those that are no padding.
        padding: ``"zero"`` makes padding's embeddings zero.
    """
    output = encoder(ids, attention_mask=mask, output_hidden_states=True)
    if tuple(layers) == (encoder.config.num_layers,):
        text = output.last_hidden_state
    else:
        text = torch.stack([rms_norm(output.hidden_states[layer]) for layer in layers]).mean(0)
    return text * mask[..., None] if padding == "zero" else text
