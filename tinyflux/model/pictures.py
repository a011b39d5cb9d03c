"""Pictures into a VAE's latents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyflux.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``, the last as long as it comes."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def downscale(config: Mapping[str, Any]) -> int:
    """Pixels per latent along a side, by a VAE's config."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


@torch.no_grad()
def encode_pictures(vae: "AutoencoderKL", images: Sequence[Image.Image], batch_size: int) -> Tensor:
    """Posterior modes ``[N, C, h, w]``, unscaled."""
    if not images:
        raise InputError("there are no pictures to encode")
    for image in images:
        if not isinstance(image, Image.Image):
            raise InputError(f"a picture must be a PIL image, not {type(image).__name__}")
    size, step = images[0].size, downscale(vae.config)
    if any(image.size != size for image in images):
        sizes = sorted({f"{image.width} x {image.height}" for image in images})
        raise InputError(f"pictures of one batch must have one size, not {', '.join(sizes[:4])}")
    if size[0] % step or size[1] % step:
        raise InputError(
            f"a picture of {size[0]} x {size[1]} pixels does not divide into the VAE's steps of "
            f"{step}: use sides that are multiples of {step}"
        )
    parameter = next(vae.parameters())
    found = []
    for batch in batches(images, batch_size):
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in batch])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(parameter.device)
        values = (values.float() / 127.5 - 1).to(parameter.dtype)
        found.append(vae.encode(values).latent_dist.mode())
    return torch.cat(found)
