"""Latents as the transformer's image tokens, and back.

A token is a square patch of ``p x p`` latents, as in FLUX, whose p is 2. Shape legend: B batch, C
channels of a latent, H and W the latents' rows and columns, h = H / p and w = W / p the tokens'.
"""

from torch import Tensor

from tinyflux.errors import InputError


def token_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns ``(h, w)`` of the tokens of ``height`` x ``width`` latents.

    Raises:
        InputError: patches do not fill the latents.
    """
    if height % patch_size or width % patch_size:
        raise InputError(
            f"latents of {height} x {width} do not divide into patches of {patch_size} x "
            f"{patch_size}: choose sides of pictures that are multiples of {patch_size} latents"
        )
    return height // patch_size, width // patch_size


def pack_latents(latents: Tensor, patch_size: int = 1) -> Tensor:
    """``[B, C, H, W]`` to ``[B, h * w, C * p * p]``, row by row; in a token channels come first.

    Raises:
        InputError: patches do not fill the latents.
    """
    if patch_size == 1:
        return latents.flatten(2).transpose(1, 2)
    height, width = token_grid(latents.shape[2], latents.shape[3], patch_size)
    patches = latents.unflatten(3, (width, patch_size)).unflatten(2, (height, patch_size))
    tokens: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return tokens


def unpack_latents(image_tokens: Tensor, height: int, width: int, patch_size: int = 1) -> Tensor:
    """Inverse of :func:`pack_latents`, to ``[B, C, height, width]``."""
    latents: Tensor
    if patch_size == 1:
        latents = image_tokens.transpose(1, 2).unflatten(2, (height, width))
        return latents
    rows, columns = token_grid(height, width, patch_size)
    patches = image_tokens.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (rows, columns))
    latents = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return latents
