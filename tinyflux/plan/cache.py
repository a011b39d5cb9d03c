"""What building the cache will take."""

import dataclasses
import os
from dataclasses import dataclass
from itertools import islice

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.estimate import Estimate, read_estimate
from tinyflux.cache.keys import variant_of
from tinyflux.cache.manifest import MANIFEST_NAME, Manifest
from tinyflux.cache.schema import ROWS
from tinyflux.cache.shards import SHARD_FOLDER
from tinyflux.cache.sources.folder import SUFFIXES
from tinyflux.cache.store import Store, open_store
from tinyflux.config import RunConfig
from tinyflux.distributed.config import ClusterConfig, SampleConfig
from tinyflux.errors import ConfigError
from tinyflux.plan.cache_formulas import estimate_by_formula, latent_grid
from tinyflux.util.config import dtype_name

ROW_BYTES = 330  # of the rows file: digests, caption, where the picture is
# A folder with more pictures is not counted before it is planned for.
MOST_COUNTED = 100_000


# What keeping the cache takes, measured by benchmarks/scale.py: bytes of a key in the driver's
# memory; of a shard's receipts and manifest entry there; of the latter on disk and in a worker.
DRIVER_SAMPLE, DRIVER_SHARD, MANIFEST_SHARD, WORKER_SHARD = 24, 13_000, 1_550, 3_300


@dataclass(frozen=True)
class CachePlan:
    """The cache of a run.

    Attributes:
        origin: what the figures come from.
        grid: height and width of latents.
        bytes: by column group.
        seconds_per_sample: by group, each alone, in one actor; empty if not known.
        seconds_together: of a sample, all groups from one reading; 0 if not known.
        hours: of all actors side by side; None if not known, 0 if the cache is there.
        actors: how many there are; ``nodes`` that they need.
        note: a sentence where ``cluster.samples`` is not what is there; else empty.
    """

    origin: str
    samples: int
    shards: int
    grid: tuple[int, int]
    bytes: dict[str, float]
    seconds_per_sample: dict[str, float]
    seconds_together: float
    hours: float | None
    actors: int
    nodes: int
    note: str

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def bookkeeping(self) -> dict[str, int]:
        """Files, and bytes of the manifest, of the driver's memory and of each worker's."""
        return {
            "files": self.shards * (2 * len(self.bytes) - 1),  # and a receipt for all but rows
            "manifest": self.shards * MANIFEST_SHARD,
            "driver": self.samples * DRIVER_SAMPLE + self.shards * DRIVER_SHARD,
            "worker": self.samples + self.shards * WORKER_SHARD,
        }

    @property
    def bytes_read(self) -> float:
        """Bytes of a sample that training reads, of one variant of its picture."""
        plain = (group for group in self.bytes if group != ROWS and not variant_of(group))
        return sum(self.bytes[group] for group in plain) / self.samples


def plan_cache(run: RunConfig) -> CachePlan:
    """From the cache itself, else an estimate that was measured for it, else formulas.

    Raises:
        ConfigError: nobody said how many samples there are, or the actors do not fit.
    """
    store = open_store(run.cache.path) if run.cache.path else None
    nodes = nodes_for("cache", run.cache, run.cluster)
    there = ""
    if store is not None and store.size(MANIFEST_NAME) is not None:
        manifest = Manifest.load(store)
        if run.cluster.samples in (0, manifest.rows):
            return _finished(manifest, run.cache.num_actors, nodes)
        there = f"the cache '{run.cache.path}' holds {manifest.rows:,} samples"
    measured = None if store is None else read_estimate(store)
    if store is None or measured is None:
        there = there or _pictures_there(run.data)
        return _from_formulas(run, nodes, there)
    there = there or f"the estimate is of {measured.samples:,} samples"
    return _from_measured(run, store, measured, nodes, there)


def _from_measured(
    run: RunConfig, store: Store, measured: Estimate, nodes: int, there: str
) -> CachePlan:
    files = store.list(SHARD_FOLDER).items()
    row_bytes = sum(size for path, size in files if f".{ROWS}." in path) / measured.samples
    scaled = _scaled(measured, run.cluster.samples, run.cache.num_actors)
    return _planned(run, scaled, "measured on a few batches", row_bytes, nodes, there)


def _from_formulas(run: RunConfig, nodes: int, there: str) -> CachePlan:
    estimate = estimate_by_formula(run)
    origin = f"formulas, in {dtype_name(run.zoo.dtype)}"
    if not estimate.cost.seconds_together:
        origin = "formulas, which know no hours"
    return _planned(run, estimate, origin, float(ROW_BYTES), nodes, there)


def _planned(
    run: RunConfig, estimate: Estimate, origin: str, row_bytes: float, nodes: int, there: str
) -> CachePlan:
    groups = {group: estimate.bytes(group) for group in estimate.cost.bytes_per_sample}
    known = bool(estimate.cost.seconds_together)
    return CachePlan(
        origin=origin,
        samples=estimate.samples,
        shards=estimate.shards,
        grid=latent_grid(run),
        bytes={ROWS: row_bytes * estimate.samples, **groups},
        seconds_per_sample=estimate.cost.seconds_per_sample,
        seconds_together=estimate.cost.seconds_together,
        hours=estimate.hours if known else None,
        actors=estimate.actors,
        nodes=nodes,
        note=_note(there, run.cluster.samples),
    )


def _note(there: str, samples: int) -> str:
    return f"{there}; planned are cluster.samples = {samples:,}" if there and samples else ""


def _pictures_there(data: DataConfig) -> str:
    """What a local folder of picture files holds; empty where that is not quickly known."""
    if data.format not in ("auto", "folder") or not os.path.isdir(data.folder):
        return ""
    names = (name.lower() for _, _, files in os.walk(data.folder) for name in files)
    pictures = (name for name in names if name.endswith(SUFFIXES))
    count = sum(1 for _ in islice(pictures, MOST_COUNTED + 1))
    return f"'{data.folder}' holds {count:,} pictures" if count <= MOST_COUNTED else ""


def _finished(manifest: Manifest, actors: int, nodes: int) -> CachePlan:
    sizes: dict[str, float] = {}
    for shard in manifest.shards:
        for group, file in shard.files.items():
            sizes[group] = sizes.get(group, 0) + file.bytes
    layout = manifest.layout("latents")
    assert layout is not None
    grid = (layout.shape[1], layout.shape[2])
    shards = len(manifest.shards)
    return CachePlan(
        origin="the finished cache",
        samples=manifest.rows,
        shards=shards,
        grid=grid,
        bytes=sizes,
        seconds_per_sample={},
        seconds_together=0.0,
        hours=0,
        actors=actors,
        nodes=nodes,
        note="",
    )


def nodes_for(section: str, asked: CacheConfig | SampleConfig, cluster: ClusterConfig) -> int:
    """The number of nodes that hold the actors of a run's ``section``.

    Raises:
        ConfigError: the cluster does not hold them.
    """
    gpus, cpus, actors = cluster.gpus_per_node, cluster.cpus_per_node, asked.num_actors
    each = actors
    if asked.gpus_per_actor:
        each = min(each, _fit(gpus, asked.gpus_per_actor))
    if asked.cpus_per_actor and cpus:
        each = min(each, int(cpus / asked.cpus_per_actor))
    if each * cluster.nodes < actors:
        raise ConfigError(
            f"{section}.num_actors = {actors} do not fit {cluster.nodes} nodes of "
            f"{cluster.gpus_per_node} GPUs and {cluster.cpus_per_node or 'unstated'} CPUs, which "
            f"hold {each} each: lower {section}.num_actors, {section}.cpus_per_actor or "
            f"{section}.gpus_per_actor, or state more nodes"
        )
    return -(-actors // each)


def _fit(gpus: int, wanted: float) -> int:
    """Ray gives an actor whole GPUs, or a share of one."""
    return gpus // -int(-wanted // 1) if wanted > 1 else gpus * int(1 / wanted)


def _scaled(estimate: Estimate, samples: int, actors: int) -> Estimate:
    """The same kind of pictures, ``samples`` of them unless 0."""
    factor = samples / estimate.samples if samples else 1.0
    shards = max(1, round(estimate.shards * factor))
    sizes = {name: round(count * factor) for name, count in estimate.samples_by_size.items()}
    return dataclasses.replace(
        estimate,
        samples=samples or estimate.samples,
        shards=shards,
        actors=min(actors, shards),
        samples_by_size=sizes,
    )
