"""The cache job on Ray against a bare loop over the same models on the same cores.

``python benchmarks/cache_build.py [--pictures N] [--actors N] [--packages DIR]``

Each contender encodes the same toy pictures with the shipped toy world. The bare loop
is ``--actors`` processes of one thread, each with its share of the pictures: decode, encode, run
both teachers, keep the tensors; it writes nothing. The job is ``build_cache`` with as many actors
of one CPU, and it indexes, hashes, writes and checks as always. Steady rates leave out the start of
processes and the loading of models, which takes seconds whatever the size of the job; whole times
are printed beside them. Prints JSON.
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from record import add_json_option, record

from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.encode import ShardTask
from tinyflux.cache.extract import Sample, extractor_for
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.keys import digest_of, sample_key
from tinyflux.cache.sources import decode_picture
from tinyflux.distributed.build import RayRunner
from tinyflux.model.config import ZooConfig
from tinyflux.model.presets import preset
from tinyflux.toy.draw_icons import icons_of_size
from tinyflux.toy.icons import write_icon_files
from tinyflux.toy.world import SHIPPED

GROUPS = ("latents", "text", "lune", "sol")


def bare_loop(configs: BuildConfigs, paths: list[str]) -> tuple[float, float]:
    """One process of the bare loop: when it began with its pictures, and when it was done."""
    torch.set_num_threads(1)
    extractor = extractor_for(configs.zoo.build(configs.model), configs.cache)
    extractor.recipe()  # loads the models
    size, kept = configs.cache.batch_size, []
    begun = time.time()
    for start in range(0, len(paths), size):
        samples = []
        for path in paths[start : start + size]:
            content = Path(path).read_bytes()
            caption = Path(path).with_suffix(".txt").read_text().strip()
            image = decode_picture(content, path, configs.data.max_pixels)
            key = sample_key(digest_of(content), image.size, caption)
            samples.append(Sample(key, caption, image))
        kept.append(extractor.columns(GROUPS, samples))
    return begun, time.time()


def time_bare(configs: BuildConfigs, processes: int) -> tuple[float, float]:
    """Steady and whole seconds."""
    paths = sorted(map(str, Path(configs.data.folder).rglob("*.png")))
    share, started = -(-len(paths) // processes), time.time()
    shares = [paths[at : at + share] for at in range(0, len(paths), share)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        spans = list(pool.map(bare_loop, [configs] * len(shares), shares))
    return max(end for _, end in spans) - min(begin for begin, _ in spans), time.time() - started


class TimedRunner(RayRunner):
    """Takes the time from the first shard's end to the last's."""

    def encode(self, tasks: Sequence[ShardTask]) -> Iterator[str]:
        self.marks: list[tuple[float, str]] = []
        for name in super().encode(tasks):
            self.marks.append((time.time(), name))
            yield name


def time_job(configs: BuildConfigs) -> tuple[float, float]:
    """Steady and whole seconds, the steady ones for all pictures at the rate after the first."""
    started, runner = time.time(), TimedRunner(configs)
    manifest = build(configs, runner)
    rows = {shard.name: shard.rows for shard in manifest.shards}
    # The first shard of every actor ends with its models loaded; count what came after those.
    skipped = runner.marks[: configs.cache.num_actors]
    after = sum(rows[name] for _, name in runner.marks) - sum(rows[name] for _, name in skipped)
    steady = (runner.marks[-1][0] - skipped[-1][0]) * manifest.rows / after
    return steady, time.time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1900)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--packages", type=Path, help="folder of npm tarballs: do not fetch them")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    add_json_option(parser)
    arguments = parser.parse_args()
    world = str(SHIPPED)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        drawn = icons_of_size(arguments.size, arguments.packages)
        count = write_icon_files(pictures, itertools.islice(drawn, arguments.pictures))
        rates: dict[str, list[float]] = {"bare": [], "ray": [], "bare_whole": [], "ray_whole": []}
        for repeat in range(arguments.repeats):
            configs = BuildConfigs(
                DataConfig(str(pictures), height=arguments.size, width=arguments.size),
                ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu"),
                CacheConfig(f"{folder}/cache{repeat}", num_actors=arguments.actors,
                            batch_size=16, rows_per_shard=64),
                replace(preset("toy"), max_text_length=48),  # some captions are long
            )  # fmt: skip
            for name, (steady, whole) in (
                ("bare", time_bare(configs, arguments.actors)),
                ("ray", time_job(configs)),
            ):
                rates[name].append(count / steady)
                rates[f"{name}_whole"].append(count / whole)
    best = {name: round(sorted(values)[len(values) // 2], 2) for name, values in rates.items()}
    result = {
        "pictures": count,
        "size": arguments.size,
        "actors": arguments.actors,
        "samples_per_second": best,
        "ratio_steady": round(best["ray"] / best["bare"], 3),
        "ratio_whole": round(best["ray_whole"] / best["bare_whole"], 3),
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
