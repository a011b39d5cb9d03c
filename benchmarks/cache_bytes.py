"""What a sample of 512 px costs on disk, and what each way of storing it costs to read.

``python benchmarks/cache_bytes.py [--rows N]``

Features of the real sizes (FLUX latents 16x64x64, T5 128x768, ten buckets of Lune's 1280 and of
Sol) are written as one shard in several ways and read back row by row in random order, warm.
Latents and teachers' features are normal random numbers, which no codec can shrink much; trained
ones have about as much entropy in their mantissas. T5 embeddings of captions of ``--tokens`` tokens
are stored without their padding, except in the predecessor's layout. Prints JSON; ratios are
against the predecessor's 348 KiB and against uncompressed reads by memory map, which is what
TinyFlux does.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import add_json_option, record
from torch import Tensor

from tinyflux.cache.manifest import ShardInfo
from tinyflux.cache.schema import GROUPS
from tinyflux.cache.shards import ShardReader, write_shard
from tinyflux.cache.store import LocalStore

PREDECESSOR_KIB = 348
BATCH = 32


def features(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random features of the real sizes, fp16."""
    torch.manual_seed(0)
    t5 = torch.randn(rows, 128, 768)
    t5[:, tokens:] = 0
    sizes = {
        "latents": (16, 64, 64),
        "clip_pooled": (768,),
        "lune": (10, 1280),
        "sol_stats": (10, 4),
        "sol_spatial": (10, 8, 8),
    }
    return {
        "t5_embeds": t5.half(),
        **{name: torch.randn(rows, *size).half() for name, size in sizes.items()},
    }


def read_mapped(directory: Path, shard: ShardInfo, order: np.ndarray) -> float:
    """Rows per second of TinyFlux's own reader."""
    reader, started = ShardReader(LocalStore(directory)), time.perf_counter()
    for at in range(0, len(order), BATCH):
        for group, file in shard.files.items():
            for name in GROUPS[group]:
                if name in file.columns:
                    reader.tensor(shard, group, name, order[at : at + BATCH])
    return len(order) / (time.perf_counter() - started)


def read_row_groups(path: Path, row_group: int, order: np.ndarray) -> float:
    """Rows per second through pyarrow, which decodes the row group of every row it is asked for."""
    file, started, count = pq.ParquetFile(path), time.perf_counter(), 0
    for row in order[:: max(1, len(order) // 64)]:
        table = file.read_row_group(int(row) // row_group)
        table.slice(int(row) % row_group, 1).to_pydict()
        count += 1
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=20)
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = arguments.rows
    columns = features(rows, arguments.tokens)
    order = np.random.default_rng(0).permutation(rows)
    keys = [f"{row:032x}" for row in range(rows)]
    found: dict[str, dict[str, float]] = {}

    with tempfile.TemporaryDirectory() as folder:
        for name, trim in (("padded", False), ("unpadded", True)):
            directory = Path(folder, name)
            shard = write_shard(LocalStore(directory), "00000", keys, columns, trim_text=trim)
            read_mapped(directory, shard, order)
            size = sum(file.bytes for file in shard.files.values())
            found[f"{name}, uncompressed pages by memory map"] = {
                "kib_per_sample": size / rows / 1024,
                "reads_per_second": read_mapped(directory, shard, order),
            }
        tables = [pq.read_table(Path(folder, "unpadded", f.path)) for f in shard.files.values()]
        joined = pa.table(
            {name: table[name] for table in tables for name in table.column_names if name != "key"}
        )
        for codec in ("zstd", "lz4"):
            for row_group in (1, 16):
                path = Path(folder, f"{codec}{row_group}.parquet")
                pq.write_table(
                    joined, path, compression=codec, row_group_size=row_group, use_dictionary=False
                )
                found[f"unpadded, {codec}, row groups of {row_group}"] = {
                    "kib_per_sample": path.stat().st_size / rows / 1024,
                    "reads_per_second": read_row_groups(path, row_group, order),
                }
    base = found["unpadded, uncompressed pages by memory map"]["reads_per_second"]
    for values in found.values():
        values["bytes_to_predecessor"] = values["kib_per_sample"] / PREDECESSOR_KIB
        values["reads_to_memory_map"] = values["reads_per_second"] / base
    result = {
        "rows": rows,
        "tokens": arguments.tokens,
        "storage": {
            name: {key: round(value, 3) for key, value in values.items()}
            for name, values in found.items()
        },
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
