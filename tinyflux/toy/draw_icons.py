"""Draws the toy pictures: ``python -m tinyflux.toy.draw_icons`` makes the files that ship.

The drawings are the SVGs of five npm packages, whose versions and SHA-512 stand in
:data:`tinyflux.toy.icons.STYLES`. What is the same thing across styles is known by its code points;
one package has names alone, and its drawings join the thing that has their name.
"""

import argparse
import base64
import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tinyflux.errors import InputError, MissingDependencyError, StorageError
from tinyflux.toy.icons import (
    FEWEST_STYLES,
    SHIPPED,
    SHIPPED_SIZE,
    STYLES,
    Icon,
    Style,
    shipped_icons,
    write_icons,
)
from tinyflux.util.logging import log_to_console

REGISTRY = "https://registry.npmjs.org"
_SKIN_TONES = {f"1f3f{digit}" for digit in "bcdef"}
_REGIONS = range(0x1F1E6, 0x1F200)
_VARIATION_SELECTOR = "fe0f"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thing:
    """A thing that enough styles draw.

    Attributes:
        name: e.g. ``red apple``.
        emoji: its code points as text.
        drawings: by style, the drawing's name in the style's package.
    """

    name: str
    emoji: str
    drawings: dict[str, str]


@dataclass(frozen=True)
class Package:
    """A style's package.

    Attributes:
        icons: by name, a drawing: ``body`` is its SVG without the outer element.
        aliases: by further name, the drawing (``parent``) and how it is turned.
        names: by code points without variation selectors, a name.
    """

    icons: dict[str, dict[str, Any]]
    aliases: dict[str, dict[str, Any]]
    names: dict[tuple[str, ...], str]

    def drawing(self, name: str) -> str:
        """The name of the drawing that ``name`` stands for, an alias's that is not turned."""
        alias = self.aliases.get(name)
        return alias["parent"] if alias and set(alias) == {"parent"} else name


def icons_of_size(size: int, packages: Path | None = None) -> Iterator[Icon]:
    """Every picture: those that ship where they have that size, drawn ones otherwise.

    Args:
        size: side in pixels.
        packages: folder of the npm tarballs; with it, pictures of any size are drawn.

    Raises:
        InputError, StorageError: as :func:`draw_icons` does.
    """
    if size == SHIPPED_SIZE and packages is None:
        return shipped_icons()
    return draw_icons(size, packages)


def draw_icons(size: int, packages: Path | None = None) -> Iterator[Icon]:
    """Every picture, ``size`` x ``size`` pixels.

    Args:
        packages: folder that has the npm tarballs; None downloads them.

    Raises:
        InputError: a size below 1, or a tarball that is not the one that is expected.
        StorageError: the registry cannot be reached.
    """
    if size < 1:
        raise InputError(f"pictures of {size} px cannot be drawn: give a size of 1 or more")
    opened = {style.name: open_package(style, packages) for style in STYLES}
    for thing in match_things(opened):
        for style in STYLES:
            if name := thing.drawings.get(style.name):
                body = opened[style.name].icons[name]["body"]
                yield Icon(thing.name, style.name, thing.emoji, draw(body, style, size))


def match_things(packages: dict[str, Package]) -> list[Thing]:
    """The things that :data:`~tinyflux.toy.icons.FEWEST_STYLES` or more draw, ordered by name.

    Skin tones and countries' flags are left out. Of things that share a name the first counts.
    """
    by_code: dict[tuple[str, ...], dict[str, str]] = {}
    for style, package in packages.items():
        for code, name in package.names.items():
            drawing = package.drawing(name)
            if drawing in package.icons:
                by_code.setdefault(code, {})[style] = drawing
    things: dict[str, Thing] = {}
    for code, drawings in sorted(by_code.items()):
        if _SKIN_TONES & set(code) or _is_flag(code):
            continue
        for style, package in packages.items():
            if not package.names and (same := _by_name(package, drawings, packages)):
                drawings = {**drawings, style: same}
        if len(drawings) < FEWEST_STYLES:
            continue
        [(name, _)] = Counter(drawings.values()).most_common(1)
        text = "".join(chr(int(point, 16)) for point in code)
        thing = Thing(name.replace("-", " "), text, drawings)
        things.setdefault(thing.name, thing)
    return sorted(things.values(), key=lambda thing: thing.name)


def _by_name(
    package: Package, drawings: dict[str, str], packages: dict[str, Package]
) -> str | None:
    """The drawing of a package without code points that has the name which others agree on."""
    names = Counter(drawings.values())
    for style, drawing in drawings.items():
        aliases = packages[style].aliases.items()
        names.update(name for name, alias in aliases if alias == {"parent": drawing})
    for name, _ in names.most_common():
        if name in package.icons:
            return name
    return None


def _is_flag(code: tuple[str, ...]) -> bool:
    """Whether these code points are a country's or a region's flag."""
    tagged = code[0] == "1f3f4" and any(point.startswith("e00") for point in code)
    return tagged or any(int(point, 16) in _REGIONS for point in code)


def draw(body: str, style: Style, size: int) -> bytes:
    """A drawing on white as an RGB PNG."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependencyError(
            "drawing the toy pictures needs resvg-py: pip install 'tinyflux[demo]'"
        ) from error
    side = style.side - 2 * style.margin
    png = resvg_py.svg_to_bytes(
        svg_string=f'<svg xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{style.margin} {style.margin} {side} {side}">{body}</svg>',
        background="#ffffff",
        width=size,
        height=size,
        skip_system_fonts=True,
    )
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(bytes(png))) as picture:
        picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def open_package(style: Style, packages: Path | None) -> Package:
    """A style's package from a folder of tarballs, or from the npm registry.

    Raises:
        InputError: the tarball is missing or is not the one that is expected.
        StorageError: the registry cannot be reached.
    """
    name = f"{style.package}-{style.version}.tgz"
    if packages is None:
        place = f"{REGISTRY}/@iconify-json/{style.package}/-/{name}"
        content = _download(place)
    else:
        path = packages / f"iconify-json-{name}"  # as `npm pack` names it
        place = str(path)
        if not path.is_file():
            raise InputError(
                f"there is no '{path}': run `npm pack @iconify-json/{style.package}@"
                f"{style.version}` in that folder"
            )
        content = path.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if digest != style.integrity:
        raise InputError(
            f"'{place}' is not the tarball that is expected (SHA-512 {digest} instead of "
            f"{style.integrity}): remove it and fetch it again"
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        drawings, names = (_member(archive, name) for name in ("icons.json", "chars.json"))
    by_code = {
        tuple(point for point in code.split("-") if point != _VARIATION_SELECTOR): name
        for code, name in sorted(names.items())
    }
    return Package(drawings["icons"], drawings.get("aliases", {}), by_code)


def _member(archive: tarfile.TarFile, name: str) -> dict[str, Any]:
    file = archive.extractfile(f"package/{name}")
    if file is None:
        raise InputError(f"package/{name} is no file of its tarball")
    content: dict[str, Any] = json.load(file)
    return content


def _download(url: str) -> bytes:
    try:
        answer = httpx.get(url, timeout=60, follow_redirects=True)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise StorageError(
            f"{url} cannot be fetched ({error!s:.200}): check the network, or fetch the packages "
            f"elsewhere with `npm pack` and name their folder with --packages"
        ) from error
    return answer.content


def main() -> None:
    """Draw the files that ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--size", type=int, default=SHIPPED_SIZE, help="side in pixels")
    parser.add_argument("--packages", type=Path, help="folder of the npm tarballs")
    arguments = parser.parse_args()
    log_to_console()
    counts = write_icons(arguments.folder, draw_icons(arguments.size, arguments.packages))
    logger.info("%s", counts)


if __name__ == "__main__":
    main()
