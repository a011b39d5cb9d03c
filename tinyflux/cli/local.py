"""``--local``: the flag of commands that do their work in this process instead of on Ray."""

import argparse
from collections.abc import Sequence

FLAG = "[--local]"  # for a command's usage


def take_local(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether ``--local`` is among the arguments, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    return options.local, rest
