"""The toy pictures: the same things in several art styles, split so that memory shows.

Five open emoji sets draw the same things, so a picture is a ``thing`` in a ``style``, and its
caption names both: ``"red apple, Noto style"``. Each picture belongs to one split, which its thing
and style alone decide:

- ``train``;
- ``pairs``: a thing that ``train`` has in other styles, in a style that ``train`` has for other
  things; never the two together;
- ``things``: a thing that ``train`` has in no style.

The pictures of 32 px ship with the package as Parquet files, named and made as those of the Hub;
:mod:`tinyflux.toy.draw_icons` draws them, at any size.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.util.files import atomic_write

SHIPPED = Path(__file__).parent / "icons"
SHIPPED_SIZE = 32
TRAIN = "train"
SPLITS = (TRAIN, "pairs", "things")
# A thing counts where at least so many styles have it.
FEWEST_STYLES = 4


@dataclass(frozen=True)
class Style:
    """An art style, and the npm package that its drawings come from.

    Attributes:
        name: as captions have it.
        package: on the npm registry, below ``@iconify-json``.
        version: of the package.
        integrity: SHA-512 of the package's tarball, as npm's lock files write it.
        side: of the drawings' square, in their own units.
        margin: empty border of most drawings, in the same units, which is cut off.
        licence: SPDX name of the drawings' licence.
        credit: whom the licence wants to be named.
        url: where the set comes from.
    """

    name: str
    package: str
    version: str
    integrity: str
    side: float
    margin: float
    licence: str
    credit: str
    url: str


STYLES = (
    Style(
        "OpenMoji",
        "openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        72,
        6,
        "CC-BY-SA-4.0",
        "OpenMoji, the open-source emoji and icon project",
        "https://openmoji.org",
    ),
    Style(
        "Noto",
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        128,
        0,
        "Apache-2.0",
        "Google, Noto Emoji",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Style(
        "Twemoji",
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        36,
        0,
        "CC-BY-4.0",
        "Twitter, Inc. and other contributors, Twemoji",
        "https://github.com/jdecked/twemoji",
    ),
    Style(
        "Fluent",
        "fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        32,
        0,
        "MIT",
        "Microsoft Corporation, Fluent Emoji",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Style(
        "EmojiOne",
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        64,
        0,
        "CC-BY-4.0",
        "Emoji One, EmojiTwo",
        "https://github.com/EmojiTwo/emojitwo",
    ),
)

ATTRIBUTION = "Pictures: " + "; ".join(
    f"{style.name}: {style.credit} ({style.url}), {style.licence}" for style in STYLES
)

# What the split is drawn by; another salt would be another dataset.
_SALT = "tinyflux icons 1"
_UNSEEN_THINGS = 0.08
_THINGS_WITH_A_PAIR = 0.5

# The demo's subset: things whose name says what they look like, few enough for a toy to learn.
_FOOD_AND_PLANTS = ((0x1F330, 0x1F37F), (0x1F950, 0x1F96F))
_COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white"}
_SHAPES = {"heart", "circle", "square"}


@dataclass(frozen=True)
class Icon:
    """One picture.

    Attributes:
        thing: its English name, e.g. ``red apple``.
        style: name of its :class:`Style`.
        emoji: the thing as text.
        png: the picture, RGB on white.
    """

    thing: str
    style: str
    emoji: str
    png: bytes

    @property
    def caption(self) -> str:
        """E.g. ``red apple, Noto style``."""
        return caption_of(self.thing, self.style)

    @property
    def split(self) -> str:
        """The split that it belongs to."""
        return split_of(self.thing, self.style)


def caption_of(thing: str, style: str) -> str:
    """The caption of a thing in a style."""
    return f"{thing}, {style} style"


def split_of(thing: str, style: str) -> str:
    """The split of a thing in a style, whatever other pictures there are.

    Of a thing that is seen at most one style is kept from training, so that a thing in two styles
    or more is in ``train`` always.
    """
    if _share("things", thing) < _UNSEEN_THINGS:
        return "things"
    if _share("pairs", thing) >= _THINGS_WITH_A_PAIR:
        return "train"
    unseen = STYLES[int(_share("style", thing) * len(STYLES))]
    return "pairs" if style == unseen.name else "train"


def _share(purpose: str, thing: str) -> float:
    """A fixed draw from [0, 1)."""
    digest = hashlib.sha256(f"{_SALT}\0{purpose}\0{thing}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def in_demo(icon: Icon) -> bool:
    """Whether the demo knows it: food, plants, and hearts, circles and squares by colour."""
    first = ord(icon.emoji[0])
    if any(low <= first <= high for low, high in _FOOD_AND_PLANTS):
        return True
    words = icon.thing.split()
    return len(words) == 2 and words[0] in _COLOURS and words[1] in _SHAPES


def file_name(split: str) -> str:
    """A split's file, as the Hub names it."""
    return f"{split}-00000-of-00001.parquet"


def write_icons(folder: Path, icons: Iterable[Icon]) -> dict[str, int]:
    """Write each split's Parquet file, ordered by thing and style; pictures by split."""
    ordered = sorted(icons, key=lambda icon: (icon.thing, icon.style))
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in SPLITS:
        chosen = [icon for icon in ordered if icon.split == split]
        sink = pa.BufferOutputStream()
        pq.write_table(_table(chosen), sink, compression="zstd", row_group_size=1024)
        atomic_write(folder / file_name(split), sink.getvalue())
        counts[split] = len(chosen)
    return counts


def write_icon_files(folder: Path, icons: Iterable[Icon]) -> int:
    """Write ``STYLE/THING.png`` and its caption, ``STYLE/THING.txt``, of each; how many there are.

    What is asked for with these names is written again; other files are left alone.
    """
    count = 0
    for icon in icons:
        picture = folder / _path(icon)
        picture.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(picture, icon.png)
        atomic_write(picture.with_suffix(".txt"), f"{icon.caption}\n".encode())
        count += 1
    return count


def read_icons(folder: Path, split: str) -> list[Icon]:
    """The pictures of a split that :func:`write_icons` wrote."""
    return [
        Icon(row["thing"], row["style"], row["emoji"], row["image"]["bytes"])
        for row in pq.read_table(folder / file_name(split)).to_pylist()
    ]


def shipped_icons() -> Iterator[Icon]:
    """Every picture that ships with the package, of :data:`SHIPPED_SIZE` pixels."""
    for split in SPLITS:
        yield from read_icons(SHIPPED, split)


def _table(icons: list[Icon]) -> pa.Table:
    """The columns, with what makes the Hub's library show ``image`` as pictures."""
    text = {"dtype": "string", "_type": "Value"}
    features = {"image": {"_type": "Image"}} | dict.fromkeys(
        ("text", "thing", "style", "emoji"), text
    )
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), *((name, pa.string()) for name in list(features)[1:])],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {
            "image": {"bytes": icon.png, "path": _path(icon)},
            "text": icon.caption,
            "thing": icon.thing,
            "style": icon.style,
            "emoji": icon.emoji,
        }
        for icon in icons
    ]
    return pa.Table.from_pylist(rows, schema)


def _path(icon: Icon) -> str:
    return f"{icon.style.lower()}/{icon.thing.replace(' ', '-')}.png"
