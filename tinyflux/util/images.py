"""Pictures as PNG bytes and back, and many on one sheet."""

import io
from math import ceil, sqrt

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: torch.Tensor | Image.Image, note: PngInfo | None = None) -> bytes:
    """A PIL image, or ``[3, H, W]`` in [0, 1], as PNG; ``note`` is kept in the file."""
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(_pixels(image[None])[0].numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=note)
    return buffer.getvalue()


def read_picture(png: bytes) -> torch.Tensor:
    """A picture file's bytes as ``[3, H, W]`` in [0, 1]."""
    with Image.open(io.BytesIO(png)) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def grid_columns(count: int) -> int:
    """Columns of a grid of ``count`` pictures, as square as can be."""
    return ceil(sqrt(count))


def image_grid(images: torch.Tensor, padding: int = 2) -> Image.Image:
    """Pictures ``[B, 3, H, W]`` in [0, 1] on one white sheet."""
    count, _, height, width = images.shape
    columns = grid_columns(count)
    rows = ceil(count / columns)
    size = (columns * (width + padding) + padding, rows * (height + padding) + padding)
    sheet = Image.new("RGB", size, "white")
    for index, picture in enumerate(_pixels(images).numpy()):
        row, column = divmod(index, columns)
        corner = (padding + column * (width + padding), padding + row * (height + padding))
        sheet.paste(Image.fromarray(picture), corner)
    return sheet


def _pixels(images: torch.Tensor) -> torch.Tensor:
    """``[B, 3, H, W]`` in [0, 1] as ``[B, H, W, 3]`` bytes on the CPU."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
