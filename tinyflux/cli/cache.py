"""``tinyflux cache``: build a dataset, and look after it."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyflux.cli.local import FLAG, take_local
from tinyflux.errors import CacheError

if TYPE_CHECKING:
    from tinyflux.cache.job import BuildConfigs
    from tinyflux.cache.runner import Runner
    from tinyflux.config import RunConfig


def build(arguments: Sequence[str]) -> None:
    """Build a dataset, or what is missing of it or has changed; with --local without Ray."""
    run, local = _parse(arguments, "build")
    from tinyflux.cache.build import build

    build(*_job(run, local))


def plan(arguments: Sequence[str]) -> None:
    """Measure a few batches and predict bytes, hours and memory; with --local without Ray."""
    run, local = _parse(arguments, "plan")
    from tinyflux.cache.build import estimate

    print(estimate(*_job(run, local)))


def repair(arguments: Sequence[str]) -> None:
    """Verify, remove what is damaged, and build it again; with --local without Ray."""
    run, _ = _parse(arguments, "repair")
    from tinyflux.cache.manifest import MANIFEST_NAME, Manifest
    from tinyflux.cache.store import open_store
    from tinyflux.cache.verify import drop, verify

    store = open_store(run.cache.path)
    try:
        Manifest.load(store)
    except CacheError as error:
        if store.size(MANIFEST_NAME) is None:
            raise
        print(f"removed: {MANIFEST_NAME} ({error})")
        store.delete(MANIFEST_NAME)
    else:
        problems = verify(store)
        for problem in problems:
            print(f"damaged: {problem}")
        for name in drop(store, problems):
            print(f"removed: {name}")
    build(arguments)


def verify(arguments: Sequence[str]) -> None:
    """Check every file: checksum, rows, keys, shapes, finite numbers."""
    from tinyflux.cache.store import open_store
    from tinyflux.cache.verify import verify

    location = _parser("verify").parse_args(arguments).path

    def progress(done: int, total: int) -> None:
        if done == total or done % max(1, total // 20) == 0:
            print(f"verify: {done}/{total} shards", flush=True)

    problems = verify(open_store(location), progress)
    for problem in problems:
        print(f"damaged: {problem}")
    if problems:
        raise CacheError(
            f"{len(problems)} files of the cache '{location}' are damaged: `tinyflux cache repair "
            f"--config FILE` makes them again"
        )
    print(f"the cache '{location}' is whole")


def inspect(arguments: Sequence[str]) -> None:
    """Print what is inside; with --html, also as a page with pictures."""
    from tinyflux.cache.inspect import describe, write_page
    from tinyflux.cache.manifest import Manifest
    from tinyflux.cache.store import open_store

    parser = _parser("inspect")
    parser.add_argument("--html", type=Path, help="write a page with decoded pictures")
    parser.add_argument("--samples", type=int, default=48, help="pictures on the page")
    parser.add_argument("--device", default="auto", help="that decodes them")
    options = parser.parse_args(arguments)
    print(describe(Manifest.load(open_store(options.path))))
    if options.html:
        write_page(options.path, options.html, options.samples, options.device)
        print(f"\npage: {options.html}")


def gc(arguments: Sequence[str]) -> None:
    """Remove files that the manifest does not list."""
    from tinyflux.cache.claim import claim
    from tinyflux.cache.manifest import Manifest
    from tinyflux.cache.store import open_store
    from tinyflux.cache.verify import unlisted

    parser = _parser("gc")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_args(arguments)
    store = open_store(options.path)
    if not Manifest.load(store).built:
        raise CacheError(f"'{options.path}' was saved from memory: there is nothing to remove")
    with claim(store):
        files = dict(unlisted(store))
        size = sum(files.values())
        for path in files:
            print(path)
            if not options.dry_run:
                store.delete(path)
    verb = "would free" if options.dry_run else "freed"
    print(f"gc: {len(files)} files, {verb} {size / 2**20:.2f} MiB")


def export(arguments: Sequence[str]) -> None:
    """Write ordinary Parquet files for other programs."""
    from tinyflux.cache.export import export

    parser = _parser("export")
    parser.add_argument("output", type=Path, help="a directory that does not exist yet")
    options = parser.parse_args(arguments)
    print(f"exported {export(options.path, options.output)} rows to {options.output}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "build": build,
    "plan": plan,
    "inspect": inspect,
    "verify": verify,
    "repair": repair,
    "gc": gc,
    "export": export,
}


def cache(arguments: Sequence[str]) -> None:
    """Dispatch ``tinyflux cache COMMAND``."""
    parser = argparse.ArgumentParser(prog="tinyflux cache")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    options, rest = parser.parse_known_args(arguments[:1])
    COMMANDS[options.command]([*rest, *arguments[1:]])


def _parse(arguments: Sequence[str], name: str) -> "tuple[RunConfig, bool]":
    """The run of a command that builds, and whether it is to do without Ray."""
    from tinyflux.config import parse_run_config

    local, settings = take_local(arguments)
    return parse_run_config(settings, f"tinyflux cache {name} {FLAG}"), local


def _job(run: "RunConfig", local: bool) -> "tuple[BuildConfigs, Runner]":
    """What is built, and what does the work."""
    from tinyflux.cache.job import BuildConfigs
    from tinyflux.cache.runner import LocalRunner

    configs = BuildConfigs.begin(run.data, run.zoo, run.cache, run.model)
    if local:
        return configs, LocalRunner(configs)
    from tinyflux.distributed.build import RayRunner

    return configs, RayRunner(configs)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tinyflux cache {name}", description=COMMANDS[name].__doc__
    )
    parser.add_argument("path", help="the dataset's directory or URL")
    return parser
