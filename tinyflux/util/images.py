"""Pictures as PNG bytes."""

import io

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: torch.Tensor | Image.Image, note: PngInfo | None = None) -> bytes:
    """A PIL image, or ``[3, H, W]`` in [0, 1], as PNG; ``note`` is kept in the file."""
    if isinstance(image, torch.Tensor):
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=note)
    return buffer.getvalue()
