"""Picture files decoded with care, and brought to a size."""

import io
import warnings

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from tinyflux.cache.keys import Size
from tinyflux.errors import InputError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def decode_picture(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """An encoded picture as RGB: upright, transparency on white, the first frame.

    Raises:
        InputError: ``name`` is no picture, is broken, or has more than ``max_pixels``.
    """
    return _decode(content, name, max_pixels, "white")


def decode_mask(content: bytes, name: str, size: Size, max_pixels: int) -> Image.Image:
    """A picture's foreground as greys (mode L); white is foreground, what is transparent is not.

    A mask of zeros and ones is read as one of black and white.

    Args:
        size: of the upright picture, which the mask must have.

    Raises:
        InputError: as for :func:`decode_picture`, or another size.
    """
    mask = _decode(content, f"{name} (mask)", max_pixels, "black").convert("L")
    if mask.size != size:
        raise InputError(
            f"the mask of '{name}' is {mask.width} x {mask.height} pixels, the picture "
            f"{size[0]} x {size[1]}: draw it again at that size"
        )
    if mask.getextrema()[1] == 1:
        return mask.point(lambda value: value * 255)
    return mask


def _decode(content: bytes, name: str, max_pixels: int, behind: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # PIL only warns between its limit and twice that; the limit here is max_pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = _decoded_size(image)
                if width * height > max_pixels:
                    raise InputError(
                        f"picture '{name}' is too large: {width} x {height} pixels are more than "
                        f"data.max_pixels = {max_pixels}"
                    )
                image.load()
                upright = ImageOps.exif_transpose(image)
                if image.mode == "CMYK" and image.format != "TIFF" and "adobe" not in image.info:
                    # PIL takes every CMYK JPEG for one of Adobe's, which hold negatives.
                    upright = ImageChops.invert(upright)
                return _to_rgb(upright, name, behind)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"picture '{name}' is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"'{name}' is not a picture that can be read (png, jpg, webp, bmp, gif, tiff): replace "
            f"it or take it out"
        ) from error
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise InputError(
            f"picture '{name}' is broken ({error!s:.200}): replace it or take it out"
        ) from error


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that PIL will make room for."""
    if isinstance(image, TiffImageFile):
        # A tile is decoded whole, and may be larger than the picture.
        tile = (image.tag_v2.get(TILEWIDTH, 0), image.tag_v2.get(TILELENGTH, 0))
        return max(image.width, tile[0]), max(image.height, tile[1])
    return image.size


def _to_rgb(image: Image.Image, name: str, behind: str) -> Image.Image:
    """Any mode as 8-bit RGB, transparency on the colour ``behind``."""
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL would clip, not scale
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(f"picture '{name}' has greys of more than 16 bits: save it with 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise InputError(
            f"picture '{name}' has floating-point greys, whose white is not known: save it with 16 "
            f"bits"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, behind)
        return Image.alpha_composite(ground, image).convert("RGB")
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
