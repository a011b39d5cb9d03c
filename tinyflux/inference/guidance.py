"""One step's question to the model: the velocity of latents, with or without guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import pack_latents, token_grid, unpack_latents


@dataclass
class TextCondition:
    """Text embeddings: ``t5`` ``[B, L, D]`` and ``pooled`` ``[B, P]``."""

    t5: Tensor
    pooled: Tensor


def guided_velocity(
    model: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    cond: TextCondition,
    uncond: TextCondition | None,
    guidance: Tensor | float,
    patch_size: int = 1,
) -> Tensor:
    """Velocity under classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).

    ``v_uncond + guidance * (v_cond - v_uncond)``, both from one batched forward.

    Args:
        x: ``[B, C, H, W]`` latents at times ``t`` ``[B]``.
        uncond: the embeddings of the first G samples' negative prompts; the other ``B - G``
            samples follow plain ``v_cond``, and None means all do.
        guidance: one factor, or ``[G]``.
        patch_size: side of the model's tokens in latents.

    Returns:
        ``[B, C, H, W]`` in fp32.
    """
    batch, _, height, width = x.shape
    t5, pooled = cond.t5, cond.pooled
    grid = token_grid(height, width, patch_size)
    inputs, times = pack_latents(x, patch_size), t
    if uncond is not None:
        guided = uncond.t5.shape[0]
        inputs, times = torch.cat([inputs, inputs[:guided]]), torch.cat([t, t[:guided]])
        t5, pooled = torch.cat([t5, uncond.t5]), torch.cat([pooled, uncond.pooled])
    img_ids = TinyFluxDeep.create_img_ids(inputs.shape[0], *grid, device=x.device)
    v = model(inputs, t5, pooled, times, img_ids, grid=grid).float()
    if uncond is not None:
        v, v_uncond = v[:batch], v[batch:]
        scale = torch.as_tensor(guidance, dtype=v.dtype, device=v.device).reshape(-1, 1, 1)
        v = torch.cat([v_uncond + scale * (v[:guided] - v_uncond), v[guided:]])
    return unpack_latents(v, height, width, patch_size)
