"""A dataset as ordinary Parquet for other programs: a row a sample, tensors as lists."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.keys import variant_of
from tinyflux.cache.manifest import ShardInfo
from tinyflux.cache.schema import GROUPS, KEY, ROWS, column_names
from tinyflux.cache.shards import ShardReader
from tinyflux.cache.store import Store, open_store
from tinyflux.errors import CacheError
from tinyflux.util.config import dtype_name


def export(location: str, output: Path) -> int:
    """Write one file per shard to the new directory ``output``; it appears when it is whole.

    Each tensor is a fixed-size list of its dtype; its shape stands in the field's metadata as
    ``shape``. Text is padded with zeros to its full length. Another variant's columns have its
    name behind theirs, as ``latents-flip``.

    Returns:
        The number of rows.

    Raises:
        CacheError: there is something at ``output``.
    """
    dataset = CachedDataset(location)
    if output.exists():
        raise CacheError(f"'{output}' exists already: name a new directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        for number, shard in enumerate(dataset.manifest.shards):
            path = work / f"{number:05d}.parquet"
            pq.write_table(_table(open_store(location), shard), path, compression="zstd")
        work.chmod(0o755)
        work.rename(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return len(dataset)


def _table(store: Store, shard: ShardInfo) -> pa.Table:
    reader, kept = ShardReader(store), np.delete(np.arange(shard.rows), shard.dropped)
    any_group = next(iter(shard.files))
    first = pq.read_table(*store.local([shard.files[any_group]]))
    names = [KEY, *(name for name in GROUPS[ROWS] if name in first.column_names)]
    table = first.select(names).take(pa.array(kept))
    for group, file in shard.files.items():
        variant = variant_of(group)
        for name in (name for name in column_names(group) if name in file.columns):
            rows = reader.tensor(shard, group, name, kept)
            flat = rows.flatten(1).numpy()
            values = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
            shown = f"{name}-{variant}" if variant else name
            shape = {"shape": str(list(rows.shape[1:])), "dtype": dtype_name(rows.dtype)}
            table = table.append_column(pa.field(shown, values.type, metadata=shape), values)
    return table
