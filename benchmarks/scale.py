"""What keeping a cache costs by its size: ``python benchmarks/scale.py``.

Runs the real code of a build's driver and of a training worker's start at growing sizes, each in a
process of its own, and carries the seconds and the memory on to 1e8 and 1e9 samples at the rate
between the two largest sizes. No model runs: the index is made up, and the files of features are
sparse, so what is left is the bookkeeping. A shard holds 653 samples, the mean of the default
``cache.rows_per_shard``. Beside the seconds on the clock are those of the processor, which other
work on the machine changes little. Prints JSON.

Parts:
    plan      the driver cuts the index into shards and writes their rows files
    keys      the driver looks for samples that are listed twice
    receipts  the driver reads every receipt
    manifest  the driver writes the manifest
    former    the driver looks for rows to take from shards that are no longer planned
    tasks     the driver describes the work to Ray Data
    open      a worker opens the dataset
    held_out  a worker chooses the held-out rows
    order     a worker finds the rows of 100 batches of 1,024, and is 4 passes into the data
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from record import add_json_option, record

from tinyflux.cache.config import DataConfig, MixSource
from tinyflux.cache.key_set import KeySet
from tinyflux.cache.manifest import FileInfo, Manifest, Recipe, ShardInfo
from tinyflux.cache.partition import PlannedShard, plan_shards
from tinyflux.cache.receipts import Receipt, group_path, receipt_path
from tinyflux.cache.rejected import Rejected
from tinyflux.cache.reuse import ReusableRows
from tinyflux.cache.rows import IndexedPicture
from tinyflux.cache.schema import Layout
from tinyflux.cache.shards import SHARD_FOLDER
from tinyflux.cache.store import LocalStore
from tinyflux.cache.tasks import describe_tasks, read_receipts
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.order import Rows, SampleOrder, Stream
from tinyflux.util.config import to_dict

SIDE, PER_SHARD, FINGERPRINT = 512, 653, "0123456789abcdef" * 2
COLUMNS = {
    "latents": {"latents": Layout(20_000, (16, 64, 64), "float16")},
    "text": {
        "t5_length": Layout(20_000, (), "int32"),
        "t5_embeds": Layout(23_000, (128, 768), "float16", True),
        "clip_pooled": Layout(30_000_000, (768,), "float16"),
    },
    "lune": {"lune": Layout(20_000, (10, 1280), "float16")},
    "sol": {
        "sol_stats": Layout(20_000, (10, 4), "float16"),
        "sol_spatial": Layout(80_000, (10, 8, 8), "float16"),
    },
}
FINGERPRINTS = dict.fromkeys(COLUMNS, FINGERPRINT)
# What fits a few minutes, by part; the plan and held_out touch every row.
SIZES = {
    "plan": (10_000, 100_000, 400_000),
    "keys": (100_000, 1_000_000, 4_000_000),
    "receipts": (100_000, 1_000_000, 4_000_000),
    "manifest": (100_000, 1_000_000, 10_000_000),
    "former": (100_000, 1_000_000, 4_000_000),
    "tasks": (10_000, 100_000, 1_000_000),
    "open": (100_000, 1_000_000, 10_000_000),
    "held_out": (10_000, 100_000, 1_000_000),
    "order": (100_000, 1_000_000, 10_000_000, 100_000_000),
}
Work = Callable[[], object]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def index(rows: int) -> Iterator[list[IndexedPicture]]:
    """Splits of 1,000 pictures, as ``read_index`` gives them."""
    for start in range(0, rows, 1000):
        yield [
            IndexedPicture(
                source=f"train-{n // 10_000:06d}.tar/{n:09d}.jpg",
                locator=json.dumps([f"train-{n // 10_000:06d}.tar", n * 1000, 90_000]),
                mask_locator="",
                captions=[f"a caption of about as many words as captions have, number {n}"],
                picture=digest("picture", n)[:32],
                width=SIDE,
                height=SIDE,
            )
            for n in range(start, min(start + 1000, rows))
        ]


def config() -> DataConfig:
    return DataConfig("pictures", height=SIDE, width=SIDE)


def shard_name(number: int) -> str:
    return digest("shard", number)[:16]


def planned_shards(samples: int) -> list[PlannedShard]:
    """As ``plan_shards`` gives them, without their files."""
    found = []
    for number in range(-(-samples // PER_SHARD)):
        name = shard_name(number)
        file = FileInfo(rows_path(number), 0, digest("rows", number))
        found.append(PlannedShard(name, PER_SHARD, (SIDE, SIDE), file))
    return found


def rows_path(number: int) -> str:
    return f"{SHARD_FOLDER}/{shard_name(number)}.rows.{digest('list', number)[:8]}.parquet"


def group_file(number: int, group: str) -> FileInfo:
    path = group_path(shard_name(number), group, FINGERPRINT)
    return FileInfo(path, 0, digest(group, number), COLUMNS[group])


def make_manifest(samples: int) -> Manifest:
    """Of shards whose files are empty."""
    shards = tuple(
        ShardInfo(
            shard.name,
            shard.rows,
            {"rows": shard.file, **{group: group_file(number, group) for group in COLUMNS}},
        )
        for number, shard in enumerate(planned_shards(samples))
    )
    return Manifest(PER_SHARD * len(shards), Recipe(), shards, built=True)


def plan(root: Path, samples: int) -> Work:
    (root / SHARD_FOLDER).mkdir()
    splits = list(index(samples))
    return lambda: list(plan_shards(LocalStore(root), config(), splits, 1024, Rejected()))


def keys(_: Path, samples: int) -> Work:
    rng = np.random.default_rng(0)

    def look() -> KeySet:
        found = KeySet()
        for _ in range(samples // 1000):
            digits = rng.bytes(16 * 1000).hex()
            found.add([digits[start : start + 32] for start in range(0, len(digits), 32)])
        return found

    return look


def write_receipts(root: Path, samples: int) -> list[PlannedShard]:
    """Four receipts of each shard, and their files."""
    (root / "receipts").mkdir()
    (root / SHARD_FOLDER).mkdir()
    planned = planned_shards(samples)
    for number, shard in enumerate(planned):
        for group in COLUMNS:
            file = group_file(number, group)
            (root / file.path).touch()
            receipt = Receipt(shard.name, group, FINGERPRINT, shard.rows, shard.size, file)
            path = root / receipt_path(shard.name, group, FINGERPRINT)
            path.write_bytes(json.dumps(to_dict(receipt)).encode())
    return planned


def receipts(root: Path, samples: int) -> Work:
    planned = write_receipts(root, samples)
    return lambda: read_receipts(LocalStore(root), planned, FINGERPRINTS)


def former(root: Path, samples: int) -> Work:
    planned = write_receipts(root, samples)
    return lambda: ReusableRows(LocalStore(root), FINGERPRINTS, {shard.name for shard in planned})


def manifest(root: Path, samples: int) -> Work:
    made = make_manifest(samples)
    return lambda: made.save(LocalStore(root))


def tasks(root: Path, samples: int) -> Work:
    (root / SHARD_FOLDER).mkdir()
    (root / "receipts").mkdir()
    planned = list(plan_shards(LocalStore(root), config(), index(samples), 1024, Rejected()))
    lacking = {shard.name: list(COLUMNS) for shard in planned}

    def describe() -> list[str]:
        found = describe_tasks(LocalStore(root), planned, lacking, FINGERPRINTS)
        return [json.dumps(to_dict(task)) for task in found]

    return describe


def write_dataset(root: Path, samples: int, rows_file: bytes) -> None:
    (root / SHARD_FOLDER).mkdir()
    made = make_manifest(samples)
    for shard in made.shards:
        for group, file in shard.files.items():
            path = root / file.path
            path.write_bytes(rows_file) if group == "rows" else path.touch()
    if rows_file:
        sizes = {"rows": len(rows_file)}
        made = Manifest(
            made.rows,
            made.recipe,
            tuple(
                ShardInfo(
                    shard.name,
                    shard.rows,
                    {
                        group: FileInfo(file.path, sizes.get(group, 0), file.sha256, file.columns)
                        for group, file in shard.files.items()
                    },
                )
                for shard in made.shards
            ),
            built=True,
        )
    made.save(LocalStore(root))


def open_dataset(root: Path, samples: int) -> Work:
    write_dataset(root, samples, b"")
    return lambda: CacheMixture([MixSource(str(root))])


def held_out(root: Path, samples: int) -> Work:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SHARD_FOLDER).mkdir()
        lists = plan_shards(LocalStore(folder), config(), index(2000), PER_SHARD, Rejected())
        whole = max(lists, key=lambda shard: shard.rows)
        content = (Path(folder) / whole.file.path).read_bytes()
    write_dataset(root, samples, content)
    data = CacheMixture([MixSource(str(root))])
    return lambda: data.held_out(0.05)


def order(root: Path, samples: int) -> Work:
    chosen = np.ones(samples, dtype=bool)

    def read() -> None:
        rows = Rows([range(samples)], chosen)
        found = SampleOrder([[Stream(rows, Fraction(1))]], 1024, 0)
        first = 4 * samples // 1024 * 1024
        for start in range(first, first + 100 * 1024, 1024):
            found.rows(range(start, start + 1024))

    return read


PARTS: dict[str, Callable[[Path, int], Work]] = {
    "plan": plan,
    "keys": keys,
    "receipts": receipts,
    "manifest": manifest,
    "former": former,
    "tasks": tasks,
    "open": open_dataset,
    "held_out": held_out,
    "order": order,
}


def status(name: str) -> int:
    """``VmRSS`` or, at its peak, ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(part: str, samples: int) -> dict[str, float]:
    """Seconds on the clock and of the processor, and the memory that it adds at its peak."""
    with tempfile.TemporaryDirectory(prefix="tinyflux-scale-") as folder:
        work = PARTS[part](Path(folder), samples)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        started, worked = time.perf_counter(), time.process_time()
        made = work()
        found = {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - worked, 3),
            "mb": round((status("VmHWM") - before) / 1e6, 1),
        }
        files = [path for path in Path(folder).rglob("manifest*") if path.is_file()]
        if part == "manifest":
            found["file_mb"] = round(sum(path.stat().st_size for path in files) / 1e6, 2)
        del made
    return found


def carried(found: dict[int, dict[str, float]], samples: int) -> dict[str, float]:
    """What ``samples`` would take, at the rate between the two largest sizes."""
    if samples in found:
        return found[samples]
    few, many = sorted(found)[-2:]
    return {
        name: round(value + (value - found[few][name]) / (many - few) * (samples - many), 1)
        for name, value in found[many].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--most", type=int, default=10**9, help="largest size that is measured")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    shard = {"samples": PER_SHARD, "files": 1 + len(COLUMNS), "receipts": len(COLUMNS)}
    result: dict[str, object] = {"shard": shard}
    for part in arguments.parts:
        found = {}
        for samples in (size for size in SIZES[part] if size <= arguments.most):
            command = [sys.executable, __file__, "--one", part, str(samples)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[samples] = json.loads(output.splitlines()[-1])
            print(part, samples, found[samples], file=sys.stderr, flush=True)
        ahead = {}
        if len(found) > 1:
            ahead = {f"{size:.0e}": carried(found, size) for size in (10**8, 10**9)}
        result[part] = {"measured": found, "carried_on": ahead}
    record(result, arguments.json)


if __name__ == "__main__":
    main()
