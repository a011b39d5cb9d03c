"""``tinyflux toy``: the toy pictures and the toy world."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def toy(arguments: Sequence[str]) -> None:
    """Dispatch ``tinyflux toy COMMAND``."""
    options = _parser().parse_args(arguments)
    if options.command == "icons":
        write_icons(options.folder, options.size, options.demo, options.packages)
    elif options.command == "pictures":
        draw_pictures(options.folder, options.size, options.all)
    else:
        unpack_world(options.folder)


def write_icons(folder: Path, size: int, demo: bool, packages: Path | None) -> None:
    """Write the toy pictures' splits as Parquet files: the demo's things, or all."""
    from tinyflux.toy import icons
    from tinyflux.toy.draw_icons import draw_icons

    if size == icons.SHIPPED_SIZE and packages is None:
        pictures = icons.shipped_icons()
    else:
        pictures = draw_icons(size, packages)
    if demo:
        pictures = filter(icons.in_demo, pictures)
    counts = icons.write_icons(folder, pictures)
    told = ", ".join(f"{count} of {split}" for split, count in counts.items())
    print(f"captioned pictures of {size} px in {folder}: {told}")
    print(icons.ATTRIBUTION)


def draw_pictures(folder: Path, size: int, every: bool) -> None:
    """Draw OpenMoji as captioned pictures: the demo's subset, or ``every`` drawing."""
    from tinyflux.toy.openmoji import ATTRIBUTION, in_demo, write_picture_folder

    keep = (lambda _: True) if every else in_demo
    count = sum(1 for _ in write_picture_folder(folder, size, keep))
    subset = "every drawing without a skin tone" if every else "food, plants and shapes"
    print(f"{count} captioned pictures ({subset}) of {size} px in {folder}")
    print(ATTRIBUTION)


def unpack_world(folder: Path) -> None:
    """Copy the toy world that ships with the package to ``folder``."""
    from tinyflux.toy.world import unpack

    print(f"toy world (trained on OpenMoji, ships with the package): {unpack(folder)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinyflux toy")
    commands = parser.add_subparsers(dest="command", required=True)
    pictures = commands.add_parser("pictures", help="draw OpenMoji as a captioned picture folder")
    pictures.add_argument("folder", type=Path)
    pictures.add_argument("--size", type=int, default=32, help="side in pixels")
    pictures.add_argument("--all", action="store_true", help="not only the demo's subset")
    icons = commands.add_parser("icons", help="write things in five art styles as Parquet")
    icons.add_argument("folder", type=Path)
    icons.add_argument(
        "--size",
        type=int,
        default=32,
        help="side in pixels; other than 32 is drawn now, from npm",
    )
    icons.add_argument("--demo", action="store_true", help="only the demo's things")
    icons.add_argument("--packages", type=Path, help="folder of tarballs that `npm pack` fetched")
    world = commands.add_parser("world", help="unpack the toy world of frozen models")
    world.add_argument("folder", type=Path)
    return parser
