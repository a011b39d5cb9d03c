"""Picture files decoded with care, and brought to a size."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from tinyflux.cache.keys import Size
from tinyflux.errors import InputError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def decode_picture(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """An encoded picture as RGB: upright, transparency on white, the first frame.

    Raises:
        InputError: ``name`` is no picture, is broken, or has more than ``max_pixels``.
    """
    return _decode(content, name, max_pixels)


def decode_mask(content: bytes, name: str, size: Size, max_pixels: int) -> Image.Image:
    """A picture's foreground as greys (mode L); white is foreground.

    Args:
        size: of the upright picture, which the mask must have.

    Raises:
        InputError: as for :func:`decode_picture`, or another size.
    """
    mask = _decode(content, f"{name} (mask)", max_pixels).convert("L")
    if mask.size != size:
        raise InputError(
            f"the mask of '{name}' is {mask.width} x {mask.height} pixels, the picture "
            f"{size[0]} x {size[1]}: draw it again at that size"
        )
    return mask


def _decode(content: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # PIL only warns between its limit and twice that; the limit here is max_pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise InputError(
                        f"picture '{name}' is too large: {image.width} x {image.height} pixels "
                        f"are more than data.max_pixels = {max_pixels}"
                    )
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"picture '{name}' is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"'{name}' is not a picture that can be read (png, jpg, webp, bmp, gif, tiff): replace "
            f"it or take it out"
        ) from error
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise InputError(
            f"picture '{name}' is broken ({error!s:.200}): replace it or take it out"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL would clip, not scale
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError("greys of more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise InputError("floating-point greys have no known white")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def fit_picture(image: Image.Image, size: Size) -> Image.Image:
    """``image`` scaled until it covers ``size``, and its middle cut out."""
    if image.size == size:
        return image
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, size: Size) -> Image.Image:
    """A mask cut as :func:`fit_picture` cuts its picture."""
    if mask.size == size:
        return mask
    return ImageOps.fit(mask, size, method=Image.Resampling.BOX)
