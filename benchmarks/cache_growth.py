"""How the cost of keeping a cache grows with its rows: ``python benchmarks/cache_growth.py``.

Builds datasets of 1,000, 10,000 and 100,000 rows whose pictures are one pixel and whose features
are single numbers, so that what is left is the bookkeeping: the index, the plan, files, receipts
and the manifest. Then runs the build again, with nothing to do, opens the dataset and verifies it.
Each size in a process of its own. Prints JSON: seconds, peak memory, and the ratio of the seconds
per row to those of the smallest dataset; a ratio above 1 would mean growth faster than the rows.
"""

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import add_json_option, record

from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.encode import ShardTask
from tinyflux.cache.fingerprints import ModelFingerprints
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.manifest import GroupInfo, Recipe
from tinyflux.cache.receipts import Receipt, group_path
from tinyflux.cache.runner import LocalRunner
from tinyflux.cache.schema import KEY
from tinyflux.cache.shards import write_group, write_null_text
from tinyflux.cache.verify import verify
from tinyflux.model.config import ZooConfig
from tinyflux.model.presets import preset

SIZES = (1_000, 10_000, 100_000)


def pixel(number: int) -> bytes:
    """A PNG of one pixel of its own colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" + number.to_bytes(3, "big"))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_source(path: Path, rows: int) -> None:
    """A Parquet file as the Hub has it, in row groups of 1,000."""
    numbers = range(rows)
    images = [{"bytes": pixel(number), "path": None} for number in numbers]
    table = pa.table({"image": images, "text": [f"colour {number}" for number in numbers]})
    pq.write_table(table, path, row_group_size=1000)


class SyntheticRunner(LocalRunner):
    """Single numbers in place of features."""

    def prepare(self) -> Callable[[], ModelFingerprints]:
        groups = {group: GroupInfo({}, "float16", 1) for group in ("latents", "text")}
        text = write_null_text(self._configs.store, torch.zeros(1, 1), torch.zeros(1))
        return lambda: ModelFingerprints(Recipe(groups=groups), text)

    def encode(self, tasks: Sequence[ShardTask]) -> Iterator[str]:
        store = self._configs.store
        for task in tasks:
            rows = pa.BufferReader(store.read(task.rows_file))
            keys = pq.read_table(rows, columns=[KEY])[KEY].to_pylist()
            ones = torch.ones(len(keys), 1, 1, 1).half()
            columns = {
                "latents": {"latents": ones},
                "text": {"t5_embeds": ones[..., 0], "clip_pooled": ones[..., 0, 0]},
            }
            for group, fingerprint in task.fingerprints.items():
                path = group_path(task.name, group, fingerprint)
                file = write_group(store, path, keys, columns[group], trim_text=True)
                Receipt(task.name, group, fingerprint, len(keys), task.size, file).save(store)
            yield task.name


def measure(folder: str, rows: int) -> dict[str, float]:
    """Seconds of each thing that is done to a dataset of ``rows``."""
    source = Path(folder, "source.parquet")
    write_source(source, rows)
    configs = BuildConfigs(
        DataConfig(str(source), height=1, width=1),
        ZooConfig(device="cpu"),
        CacheConfig(f"{folder}/cache", rows_per_shard=1024),
        preset("toy"),
    )
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        found[name] = round(time.perf_counter() - started, 3)

    timed("build", lambda: build(configs, SyntheticRunner(configs)))
    timed("build_again", lambda: build(configs, SyntheticRunner(configs)))
    timed("open_and_read_keys", lambda: CachedDataset(configs.cache.path).keys())
    timed("verify", lambda: verify(configs.store))
    found["manifest_bytes"] = len(configs.store.read("manifest.json"))
    found["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(folder, arguments.rows)))
        return
    found = {}
    for rows in SIZES:
        command = [sys.executable, __file__, "--rows", str(rows)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[rows] = json.loads(output.splitlines()[-1])
    first = found[SIZES[0]]
    ratios = {
        rows: {n: round(v / first[n] * SIZES[0] / rows, 3) for n, v in values.items()}
        for rows, values in found.items()
    }
    record({"rows": found, "per_row_to_1000": ratios}, arguments.json)


if __name__ == "__main__":
    main()
