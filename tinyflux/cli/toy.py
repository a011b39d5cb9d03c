"""``tinyflux toy``: the toy pictures and the toy world."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def toy(arguments: Sequence[str]) -> None:
    """Dispatch ``tinyflux toy COMMAND``."""
    options = _parser().parse_args(arguments)
    if options.command == "icons":
        write_pictures(options.folder, options.size, options.demo, options.files, options.packages)
    else:
        unpack_world(options.folder)


def write_pictures(folder: Path, size: int, demo: bool, files: bool, packages: Path | None) -> None:
    """Write the toy pictures: each split as a Parquet file, or the train split's as files."""
    from tinyflux.toy import icons
    from tinyflux.toy.draw_icons import icons_of_size

    pictures = icons_of_size(size, packages)
    if demo:
        pictures = filter(icons.in_demo, pictures)
    if files:
        train = (icon for icon in pictures if icon.split == icons.TRAIN)
        counts = {icons.TRAIN: icons.write_icon_files(folder, train)}
    else:
        counts = icons.write_icons(folder, pictures)
    told = ", ".join(f"{count} of {split}" for split, count in counts.items())
    print(f"captioned pictures of {size} px in {folder}: {told}")
    print(icons.ATTRIBUTION)


def unpack_world(folder: Path) -> None:
    """Copy the toy world that ships with the package to ``folder``."""
    from tinyflux.toy.world import unpack

    print(f"toy world (trained on emoji, ships with the package): {unpack(folder)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinyflux toy")
    commands = parser.add_subparsers(dest="command", required=True)
    icons = commands.add_parser("icons", help="write things in five art styles as Parquet")
    icons.add_argument("folder", type=Path)
    icons.add_argument(
        "--size",
        type=int,
        default=32,
        help="side in pixels; other than 32 is drawn now, from npm",
    )
    icons.add_argument("--demo", action="store_true", help="only the demo's things")
    icons.add_argument(
        "--files",
        action="store_true",
        help="instead of every split's Parquet file, the train split's pictures and captions as "
        "STYLE/THING.png and STYLE/THING.txt",
    )
    icons.add_argument("--packages", type=Path, help="folder of tarballs that `npm pack` fetched")
    world = commands.add_parser("world", help="unpack the toy world of frozen models")
    world.add_argument("folder", type=Path)
    return parser
