"""Latents as the transformer's image tokens, and back."""

from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H * W, C]``, row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack_latents(image_tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of :func:`pack_latents`."""
    return image_tokens.transpose(1, 2).unflatten(2, (height, width))
