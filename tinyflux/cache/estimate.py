"""What a build will cost, measured on a few batches before it is begun."""

import json
import resource
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tinyflux.cache.config import DataConfig
from tinyflux.cache.encode import ShardWork
from tinyflux.cache.extract import Extractor
from tinyflux.cache.keys import Size, base_of
from tinyflux.cache.receipts import Receipt
from tinyflux.cache.rows import Row
from tinyflux.cache.shards import SHARD_FOLDER, write_group
from tinyflux.cache.store import LocalStore, Store
from tinyflux.errors import ConfigError
from tinyflux.util.config import from_dict
from tinyflux.util.text import duration

ESTIMATE_NAME = "estimate.json"


@dataclass(frozen=True)
class Cost:
    """Of samples of one size, in one process.

    Attributes:
        bytes_per_sample, bytes_per_shard: on disk, by column group; together ``a * n + b``.
        seconds_per_sample: by group, each alone, pictures read for it.
        seconds_together: per sample, of all groups from one reading.
        seconds_to_load: of the models.
        memory, gpu_memory: peak of the process, in bytes.
    """

    bytes_per_sample: dict[str, float]
    bytes_per_shard: dict[str, float]
    seconds_per_sample: dict[str, float]
    seconds_together: float
    seconds_to_load: float
    memory: int
    gpu_memory: int


@dataclass(frozen=True)
class Estimate:
    """Of a whole build.

    Attributes:
        samples, shards, actors: how many there will be.
        samples_by_size: ``"512 x 512"`` to samples.
        measured: size at which ``cost`` was measured; other sizes count by their pixels.
    """

    samples: int
    shards: int
    actors: int
    samples_by_size: dict[str, int]
    measured: Size
    cost: Cost

    @property
    def weighted_samples(self) -> float:
        """Samples, each counted by its pixels in units of the measured size."""
        one = self.measured[0] * self.measured[1]
        sizes = ((text.split(" x "), n) for text, n in self.samples_by_size.items())
        return sum(int(w) * int(h) / one * n for (w, h), n in sizes)

    def bytes(self, group: str) -> float:
        """Of a column group; only latents and masks grow with a picture's size."""
        count = self.weighted_samples if base_of(group) in ("latents", "mask") else self.samples
        cost = self.cost
        return cost.bytes_per_sample[group] * count + cost.bytes_per_shard[group] * self.shards

    @property
    def hours(self) -> float:
        """Of all actors side by side."""
        work = self.cost.seconds_together * self.weighted_samples / self.actors
        return (work + self.cost.seconds_to_load) / 3600

    def __str__(self) -> str:
        cost = self.cost
        width = max(10, *(len(group) + 1 for group in cost.seconds_per_sample))
        lines = [
            f"{self.samples} samples in {self.shards} shards; measured at "
            f"{self.measured[0]} x {self.measured[1]} pixels",
            f"{'group':{width}}{'MiB':>12}{'KiB a sample':>15}{'s a sample, alone':>20}",
        ]
        for group, seconds in cost.seconds_per_sample.items():
            size = self.bytes(group)
            lines.append(
                f"{group:{width}}{size / 2**20:12.1f}{size / self.samples / 1024:15.2f}"
                f"{seconds:20.4f}"
            )
        total = sum(self.bytes(group) for group in cost.seconds_per_sample)
        lines += [
            f"{'together':{width}}{total / 2**20:12.1f}{total / self.samples / 1024:15.2f}"
            f"{cost.seconds_together:20.4f}",
            "together is less than the sum: alone, each reads the pictures for itself",
            f"{duration(3600 * self.hours)} with {self.actors} actors, "
            f"{duration(cost.seconds_to_load)} of it to load the models",
            f"{cost.memory / 2**30:.1f} GiB of memory for each actor, "
            f"{cost.gpu_memory / 2**30:.1f} GiB on its GPU",
        ]
        return "\n".join(lines)


def measure(
    extractor: Extractor,
    data: DataConfig,
    rows: Sequence[Row],
    size: Size,
    groups: Sequence[str],
    rows_per_shard: int,
) -> Cost:
    """Encode ``rows`` of a shard, twice over, and write them.

    The first batch only warms up. Four batches are plenty.
    """
    started = time.perf_counter()
    extractor.recipe()  # loads the models
    loaded = time.perf_counter() - started
    count, batch = len(rows), extractor.batch_size
    batches = [list(range(at, min(at + batch, count))) for at in range(0, count, batch)]

    def encode(chosen: Sequence[str]) -> tuple[ShardWork, float]:
        work = ShardWork(extractor, data, rows, size, chosen)
        work.add(batches[0])
        begun = time.perf_counter()
        for rest in batches[1:] or batches:
            work.add(rest)
        return work, (time.perf_counter() - begun) / sum(map(len, batches[1:] or batches))

    alone = {group: encode([group]) for group in groups}
    _, together = encode(groups)
    per_sample, per_shard = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for group, (work, _) in alone.items():
            sizes = {}
            for times in (1, 3):
                columns = {
                    name: torch.cat([part] * times) for name, part in work.columns(group).items()
                }
                keys = [f"{row:032x}" for row in range(len(next(iter(columns.values()))))]
                path = f"{SHARD_FOLDER}/{group}.{times}.parquet"
                sizes[len(keys)] = write_group(LocalStore(folder), path, keys, columns, True).bytes
            (few, small), (many, large) = sizes.items()
            per_sample[group] = (large - small) / (many - few)
            per_shard[group] = small - per_sample[group] * few
    # A shard's columns are held until it is written, once as tensors and once as a file.
    held = int(2 * rows_per_shard * sum(per_sample.values()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    seconds = {group: value for group, (_, value) in alone.items()}
    return Cost(per_sample, per_shard, seconds, together, loaded, peak + held, gpu)


def compare(estimate: Estimate, sizes: Mapping[str, int], receipts: Iterable[Receipt]) -> str:
    """Plan beside actual, as a table.

    Args:
        sizes: bytes on disk by column group.
        receipts: of what was computed.
    """
    spent: dict[str, float] = {}
    for receipt in receipts:
        spent[receipt.group] = spent.get(receipt.group, 0.0) + receipt.seconds
    width = max(10, *(len(group) + 1 for group in estimate.cost.seconds_per_sample))
    lines = [f"{'group':{width}}{'planned MiB':>13}{'actual MiB':>12}"]
    for group in estimate.cost.seconds_per_sample:
        actual = sizes.get(group, 0) / 2**20
        lines.append(f"{group:{width}}{estimate.bytes(group) / 2**20:13.2f}{actual:12.2f}")
    planned = estimate.cost.seconds_together * estimate.weighted_samples
    lines.append(f"actors' seconds: planned {planned:.0f}, actual {sum(spent.values()):.0f}")
    return "\n".join(lines)


def read_estimate(store: Store) -> Estimate | None:
    """What was predicted here, if it was asked."""
    try:
        return from_dict(Estimate, json.loads(store.read(ESTIMATE_NAME)), "estimate")
    except (OSError, ValueError, TypeError, ConfigError):
        return None
