"""Reading a cache in shuffled order against other loaders: ``python benchmarks/reading.py``.

The same ``--mib`` of samples (fp16, the sizes of 512 px, texts at full length) are written in each
format and read for one pass, shuffled within the same window, into fp16 batches. Ours is what a
training worker runs: ``StepReader`` to :class:`TrainBatch`, behind ``prefetch``. The others read
with and without a worker process of their own, and their better figure counts. ``memory map``, the
ceiling, gathers random rows of one file; ``sequential`` reads our shards from end to end and makes
no samples of them.

Each reads in a process of its own, cold (its files dropped from the page cache, which a container
may not be able to do to its disk's own cache) and then warm. ``first_batch_seconds`` begins when
the packages are imported and, for Ray Data, Ray runs. Packages that are not there are reported as
missing. mosaicml-streaming needs another transformers and numpy than TinyFlux, so they go into an
environment of their own, whose Python is given by ``--others-python``: ``pip install torch==2.13.0
mosaicml-streaming==0.13.0 litdata==0.2.76 webdataset==1.0.2``.

After the timed passes comes one that adds up every number of every sample: a loader whose sum is
not the samples' own has skipped or changed something, and is reported as wrong.

Prints JSON; progress goes to stderr.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import add_json_option, record

SHAPES = {
    "latents": (16, 64, 64),
    "t5_embeds": (128, 768),
    "clip_pooled": (768,),
    "lune": (10, 1280),
    "sol_stats": (10, 4),
    "sol_spatial": (10, 8, 8),
}
SAMPLE_BYTES = sum(2 * int(np.prod(shape)) for shape in SHAPES.values())
ROWS_PER_SHARD = 256
SHUFFLE = 4096  # samples: tinyflux/data/order.py's window
OURS = "tinyflux"
# Each loader, and with how many worker processes it is tried.
LOADERS = {
    OURS: (0,),
    "mosaicml-streaming": (0, 1),
    "litdata": (0, 1),
    "webdataset": (0, 1),
    "ray data": (0,),
    "memory map": (0,),
    "sequential": (0,),
}
# Of those that are packages of others.
PACKAGES = {
    "mosaicml-streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "webdataset": "webdataset",
    "ray data": "ray",
}
MODULES = {
    OURS: "tinyflux.data.reader",
    "mosaicml-streaming": "streaming",
    "ray data": "ray",
}
ELSEWHERE = ("mosaicml-streaming", "litdata", "webdataset")  # in the other environment


def samples(shard: int) -> dict[str, np.ndarray]:
    """The columns of one shard: finite random fp16, the same whoever asks."""
    random = np.random.default_rng(shard)
    return {
        name: (random.integers(0, 0x3C00, (ROWS_PER_SHARD, *shape), np.uint16)).view(np.float16)
        for name, shape in SHAPES.items()
    }


def rows_of(shards: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Sample by sample."""
    for shard in range(shards):
        columns = samples(shard)
        for row in range(ROWS_PER_SHARD):
            yield shard * ROWS_PER_SHARD + row, {name: part[row] for name, part in columns.items()}


def write(loader: str, folder: Path, shards: int) -> None:
    """The samples in a loader's own format."""
    if loader == OURS:
        from tinyflux.cache.manifest import Manifest, Recipe
        from tinyflux.cache.shards import write_shard
        from tinyflux.cache.store import LocalStore

        found, store = [], LocalStore(folder)
        for shard in range(shards):
            keys = [f"{shard * ROWS_PER_SHARD + row:032x}" for row in range(ROWS_PER_SHARD)]
            columns = {name: torch.from_numpy(part) for name, part in samples(shard).items()}
            found.append(write_shard(store, f"{shard:05d}", keys, columns, trim_text=False))
        buckets = tuple(np.linspace(0.05, 0.95, 10).tolist())
        Manifest(shards * ROWS_PER_SHARD, Recipe(t_buckets=buckets), tuple(found)).save(store)
    elif loader == "mosaicml-streaming":
        from streaming import MDSWriter

        kinds = {
            name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in SHAPES.items()
        }
        with MDSWriter(out=str(folder), columns=kinds, size_limit=2**26) as writer:
            for _, row in rows_of(shards):
                writer.write(row)
    elif loader == "litdata":
        from litdata.streaming import Cache

        cache = Cache(str(folder), chunk_bytes="64MB")
        for index, row in rows_of(shards):
            cache[index] = {name: torch.from_numpy(value) for name, value in row.items()}
        cache.done()
        cache.merge()
    elif loader == "webdataset":
        from webdataset import ShardWriter

        with ShardWriter(f"{folder}/%05d.tar", maxsize=2**26, verbose=0) as sink:
            for index, row in rows_of(shards):
                sink.write(
                    {"__key__": f"{index:08d}", **{f"{name}.npy": row[name] for name in row}}
                )
    elif loader == "ray data":
        import ray

        data = ray.data.range(shards, override_num_blocks=shards)
        data.map_batches(lambda batch: samples(int(batch["id"][0])), batch_size=None).write_parquet(
            str(folder)
        )
    elif loader == "memory map":
        with (folder / "rows").open("wb") as file:
            for _, row in rows_of(shards):
                for value in row.values():
                    file.write(value.tobytes())


def batches(loader: str, folder: Path, batch_size: int, workers: int) -> Iterator[Any]:
    """One pass or, of those without an end, more, as batches of fp16 tensors."""
    if loader == OURS:
        from tinyflux.cache.config import MixSource
        from tinyflux.data.mixture import CacheMixture
        from tinyflux.data.order import BLOCK, WINDOW
        from tinyflux.data.reader import StepReader
        from tinyflux.trainer.prefetch import prefetch

        assert BLOCK * WINDOW == SHUFFLE
        data = CacheMixture([MixSource(str(folder))])
        reader = StepReader(data, data.held_out(0.0), batch_size)
        for step in prefetch(reader.steps()):
            yield {name: getattr(step.micro_batches[0], name) for name in SHAPES}
    elif loader == "mosaicml-streaming":
        from streaming import StreamingDataset
        from torch.utils.data import DataLoader

        mds = StreamingDataset(
            local=str(folder),
            shuffle=True,
            shuffle_algo="py1br",
            shuffle_block_size=SHUFFLE,
            batch_size=batch_size,
            num_canonical_nodes=1,
        )
        yield from DataLoader(mds, batch_size=batch_size, num_workers=workers)
    elif loader == "litdata":
        from litdata import StreamingDataLoader
        from litdata import StreamingDataset as LitDataset

        lit = LitDataset(str(folder), shuffle=True)
        yield from StreamingDataLoader(lit, batch_size=batch_size, num_workers=workers)
    elif loader == "webdataset":
        from torch.utils.data import DataLoader
        from webdataset import WebDataset

        tars = sorted(map(str, folder.glob("*.tar")))
        web = WebDataset(tars, shardshuffle=len(tars), seed=0)
        pipeline = web.shuffle(SHUFFLE).decode().map(_arrays)
        for batch in DataLoader(pipeline, batch_size=batch_size, num_workers=workers):
            yield {name: batch[name] for name in SHAPES}  # webdataset adds names of files
    elif loader == "ray data":
        import ray

        yield from ray.data.read_parquet(str(folder)).iter_torch_batches(
            batch_size=batch_size,
            local_shuffle_buffer_size=SHUFFLE,
            local_shuffle_seed=0,
        )
    elif loader == "memory map":
        rows = np.memmap(folder / "rows", np.uint8, "r").reshape(-1, SAMPLE_BYTES)
        order = np.random.default_rng(0).permutation(len(rows))
        for at in range(0, len(order), batch_size):
            yield {"row": torch.from_numpy(rows[order[at : at + batch_size]])}
    elif loader == "sequential":
        buffer = bytearray(batch_size * SAMPLE_BYTES)
        for path in sorted(folder.parent.joinpath(OURS, "shards").iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    yield buffer


def _arrays(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(sample[f"{name}.npy"]) for name in SHAPES}


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def read(loader: str, folder: Path, rows: int, batch_size: int, workers: int) -> dict[str, float]:
    """Samples per second of one pass, its start-up counted, and how long the first batch took."""
    started = time.perf_counter()
    found = batches(loader, folder, batch_size, workers)
    next(found)
    first = time.perf_counter() - started
    if loader == "sequential":
        for _ in found:
            pass
    else:
        count = sum(1 for _ in islice(found, rows // batch_size - 1))
        if count < rows // batch_size - 1:
            raise SystemExit(f"{loader} ended after {count + 1} of {rows // batch_size} batches")
    seconds = time.perf_counter() - started
    found.close()  # type: ignore[attr-defined]
    return {"samples_per_second": rows / seconds, "first_batch_seconds": first}


def measured(loader: str, workers: int, root: Path, arguments: argparse.Namespace) -> Any:
    """What one process found out about one loader."""
    python = arguments.others_python if loader in ELSEWHERE else sys.executable
    command = [python, __file__, "--root", str(root), "--one", loader]
    command += ["--mib", str(arguments.mib), "--batch-size", str(arguments.batch_size)]
    command += ["--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["without a word"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def one(arguments: argparse.Namespace) -> None:
    """In a process of its own: write the samples unless they are there, then read them."""
    loader = arguments.one
    torch.set_num_threads(1)
    if loader == "mosaicml-streaming":
        # It imports torchvision, whose builds for CUDA do not load beside a torch for CPUs.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if LOADERS[loader] != (0,) or loader in MODULES:
        try:
            __import__(MODULES.get(loader, loader))
        except ModuleNotFoundError as error:
            print(json.dumps({"missing": str(error)}))
            return
    if loader == OURS:
        pass  # not part of the first batch's time, as for the others
    if loader == "ray data":
        import ray

        ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    shards = max(1, round(arguments.mib * 2**20 / (SAMPLE_BYTES * ROWS_PER_SHARD)))
    rows = shards * ROWS_PER_SHARD
    folder = Path(arguments.root, loader.replace(" ", "-"))
    if not folder.exists():
        folder.mkdir()
        write(loader, folder, shards)
    dropped = folder if loader != "sequential" else folder.parent / OURS
    result: dict[str, Any] = {}
    for state in ("cold", "warm"):
        if state == "cold":
            drop_from_page_cache(dropped)
        result[state] = read(loader, folder, rows, arguments.batch_size, arguments.workers)
    if loader != "sequential":
        passed = islice(
            batches(loader, folder, arguments.batch_size, arguments.workers),
            rows // arguments.batch_size,
        )
        if sum(map(total, passed)) != sum(map(total_of_shard, range(shards))):
            raise SystemExit(f"{loader} did not give every sample once, as it was written")
    if loader in PACKAGES:
        result["version"] = version(PACKAGES[loader])
    print(json.dumps(result))


def total(batch: dict[str, torch.Tensor]) -> int:
    """The sum of a batch's bit patterns, 16 bits at a time."""
    parts = (value.contiguous().view(torch.int16) for value in batch.values())
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def total_of_shard(shard: int) -> int:
    return total({name: torch.from_numpy(part) for name, part in samples(shard).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--root", default="", help="where to write, else a temporary folder")
    parser.add_argument("--others-python", default=sys.executable, help="see above")
    parser.add_argument("--one", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.root or None) as folder:
        for loader, tried in LOADERS.items():
            print(loader, file=sys.stderr, flush=True)
            results = [measured(loader, n, Path(folder), arguments) for n in tried]
            good = [result for result in results if "warm" in result]
            found[loader] = results[0] if not good else {
                **good[0],
                **{
                    state: max((r[state] for r in good), key=lambda r: r["samples_per_second"])
                    for state in ("cold", "warm")
                },
            }  # fmt: skip
    ours = found[OURS]
    ratios = {
        state: {
            f"to {loader}": round(
                ours[state]["samples_per_second"] / result[state]["samples_per_second"], 3
            )
            for loader, result in found.items()
            if loader != OURS and "warm" in result
        }
        for state in ("cold", "warm")
        if "warm" in ours
    }
    record({
        "mib": arguments.mib, "sample_bytes": SAMPLE_BYTES, "batch_size": arguments.batch_size,
        "shuffle_window": SHUFFLE, "loaders": found, "ours": ratios,
    }, arguments.json)  # fmt: skip


if __name__ == "__main__":
    main()
