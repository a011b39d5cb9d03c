"""Captioned pictures: found, read and decoded with care."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from pyarrow import ArrowInvalid, fs

from tinyflux.errors import ConfigError, InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_METADATA = "metadata.jsonl"


@dataclass
class DataConfig:
    """A folder of pictures with captions.

    Attributes:
        folder: holds pictures (png, jpg, jpeg, webp, bmp; subfolders count) with a ``.txt``
            caption of the same name beside each, or a ``metadata.jsonl`` with ``file_name`` and
            ``text`` per line.
        height, width: size in pixels at which pictures are encoded.
        resize: what to do with a picture of another size: ``"error"``, or ``"crop"``: scale until
            it covers the size, then cut the middle.
    """

    folder: str = ""
    height: int = 512
    width: int = 512
    resize: str = "error"

    def __post_init__(self) -> None:
        if self.resize not in ("error", "crop"):
            raise ConfigError(f"data.resize must be 'error' or 'crop', not '{self.resize}'")
        if self.height < 1 or self.width < 1:
            raise ConfigError(
                f"data.height and data.width must be positive, not {self.height} x {self.width}"
            )


@dataclass(frozen=True)
class Source:
    """A captioned picture that has not been read yet.

    Attributes:
        path: relative to the folder.
        bytes, modified: size and time (ns) of the file, by which an edited picture is noticed.
    """

    path: str
    caption: str
    bytes: int
    modified: int


@dataclass(frozen=True)
class Sample:
    """A captioned picture ready for the encoders.

    Attributes:
        key: hash of the picture file and the caption; what this sample's randomness comes from.
        image: RGB, ``data.width`` x ``data.height``.
        source: path relative to the folder.
        width, height: size of the picture before it was resized.
    """

    key: str
    image: Image.Image
    caption: str
    source: str
    width: int
    height: int


def sample_key(picture: bytes, caption: str) -> str:
    """32 hex digits of SHA-256 over a picture's bytes and its caption."""
    content = hashlib.sha256(picture).digest() + caption.encode()
    return hashlib.sha256(content).hexdigest()[:32]


def open_folder(folder: str) -> tuple[fs.FileSystem, str]:
    """File system and path of a local folder or of a URL that pyarrow opens.

    Raises:
        ConfigError: no folder was given.
        InputError: it does not exist or cannot be reached.
    """
    if not folder:
        raise ConfigError("data.folder is not set: name a folder of pictures with captions")
    try:
        if "://" in folder:
            system, path = fs.FileSystem.from_uri(folder)
        else:
            system, path = fs.LocalFileSystem(), os.path.abspath(folder)
        kind = system.get_file_info(path).type
    except (OSError, ArrowInvalid) as error:
        raise InputError(f"data.folder '{folder}' cannot be opened: {error}") from error
    if kind != fs.FileType.Directory:
        raise InputError(f"data.folder '{folder}' is not a folder that exists: check the path")
    return system, path


def list_sources(data: DataConfig) -> list[Source]:
    """Every captioned picture of the folder, by path.

    Raises:
        InputError: no pictures, a picture without a caption, or an empty caption.
    """
    system, root = open_folder(data.folder)
    infos = {}
    for info in system.get_file_info(fs.FileSelector(root, recursive=True)):
        relative = info.path[len(root) :].lstrip("/")
        if info.is_file and not any(part.startswith(".") for part in relative.split("/")):
            infos[relative] = info
    pictures = sorted(path for path in infos if path.lower().endswith(SUFFIXES))
    if not pictures:
        raise InputError(
            f"'{data.folder}' holds no pictures: it needs png, jpg, jpeg, webp or bmp files, each "
            f"with a .txt caption of the same name"
        )

    def read(path: str) -> bytes:
        with system.open_input_stream(infos[path].path) as stream:
            return stream.read()

    captions = _metadata_captions(data.folder, read(_METADATA)) if _METADATA in infos else {}
    for path in captions:
        if path not in infos:
            raise InputError(f"'{data.folder}/{_METADATA}' lists '{path}', which does not exist")
    missing = []
    for path in pictures:
        beside = str(PurePosixPath(path).with_suffix(".txt"))
        if path in captions:
            continue
        if beside in infos:
            captions[path] = _caption(f"{data.folder}/{beside}", read(beside))
        else:
            missing.append(path)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pictures)} pictures in '{data.folder}' have no caption, such "
            f"as '{missing[0]}': put a .txt file of the same name beside each"
        )
    return [
        Source(path, captions[path], infos[path].size, infos[path].mtime_ns or 0)
        for path in pictures
    ]


def _caption(where: str, data: bytes) -> str:
    """One line of text without needless spaces."""
    try:
        caption = " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise InputError(f"the caption '{where}' is not UTF-8 text: {error}") from error
    if not caption:
        raise InputError(f"the caption '{where}' is empty: write one, or take the picture out")
    return caption


def _metadata_captions(folder: str, data: bytes) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{folder}/{_METADATA}' line {number}"
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"'{where} is not a JSON object with file_name and text: {error!r:.80}"
            ) from error
        captions[str(PurePosixPath(name))] = _caption(where, str(text).encode())
    return captions


def read_samples(data: DataConfig, sources: Iterable[Source]) -> list[Sample]:
    """Read and decode pictures.

    Raises:
        InputError: a picture that cannot be read or has another size; the message names it.
    """
    system, root = open_folder(data.folder)
    samples = []
    for source in sources:
        name = f"{data.folder}/{source.path}"
        try:
            with system.open_input_stream(f"{root}/{source.path}") as stream:
                content = stream.read()
        except OSError as error:
            raise InputError(f"picture '{name}' cannot be read: {error}") from error
        image = decode_picture(content, name)
        key = sample_key(content, source.caption)
        fitted = fit_picture(image, data, name)
        samples.append(Sample(key, fitted, source.caption, source.path, image.width, image.height))
    return samples


def decode_picture(content: bytes, name: str) -> Image.Image:
    """An encoded picture as RGB: upright, transparency on white, the first frame.

    Raises:
        InputError: ``name`` is no picture, is broken, or is too large to be meant.
    """
    try:
        with warnings.catch_warnings():
            # PIL only warns between its limit and twice that; here the limit is the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"picture '{name}' is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"'{name}' is not a picture that can be read (png, jpg, webp, bmp): replace it or "
            f"take it out"
        ) from error
    except Exception as error:  # PIL's decoders raise almost anything on broken files
        raise InputError(
            f"picture '{name}' is broken ({error}): replace it or take it out"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel; PIL would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def fit_picture(image: Image.Image, data: DataConfig, name: str) -> Image.Image:
    """``image`` at the configured size.

    Raises:
        InputError: it has another size and ``data.resize`` is ``"error"``.
    """
    size = (data.width, data.height)
    if image.size == size:
        return image
    if data.resize == "error":
        raise InputError(
            f"picture '{name}' is {image.width} x {image.height} pixels, not {data.width} x "
            f"{data.height}: set data.resize=crop to scale and cut pictures to that size"
        )
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
