"""What building the cache will take."""

import dataclasses
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tinyflux.cache.build import read_estimate
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.estimate import Cost, Estimate
from tinyflux.cache.manifest import MANIFEST_NAME, Manifest
from tinyflux.cache.schema import ROWS
from tinyflux.cache.shards import SHARD_FOLDER
from tinyflux.cache.sources.folder import SUFFIXES
from tinyflux.cache.store import open_store
from tinyflux.config import RunConfig
from tinyflux.distributed.config import ClusterConfig
from tinyflux.errors import ConfigError
from tinyflux.model.config import ZooConfig
from tinyflux.model.teachers import SPATIAL_SIZE
from tinyflux.plan import encoders
from tinyflux.util.buckets import default_buckets
from tinyflux.util.config import dtype_name

KEY_BYTES = 36  # 32 hex digits and their length
ROW_BYTES = 330  # of the rows file: digests, caption, where the picture is
FILE_BYTES = 860.0  # of Parquet around the rows of a file
# Shards end where their keys say: between a quarter of the most and all, at this on average.
SHARD_FILL = 0.64
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
        """Of a sample, in training."""
        return (self.total_bytes - self.bytes.get(ROWS, 0)) / self.samples


def plan_cache(run: RunConfig) -> CachePlan:
    """From the cache itself, else an estimate that was measured for it, else formulas.

    Raises:
        ConfigError: nobody said how many samples there are, or the actors do not fit.
    """
    cluster: ClusterConfig = run.cluster
    store = open_store(run.cache.path) if run.cache.path else None
    nodes = _nodes(run.cache.num_actors, run.cache, cluster)
    factor = 2 ** (len(_vae_channels(run.zoo)) - 1)
    grid = (run.data.height // factor, run.data.width // factor)
    there = ""
    if store is not None and store.size(MANIFEST_NAME) is not None:
        manifest = Manifest.load(store)
        if cluster.samples in (0, manifest.rows):
            return _finished(manifest, run.cache.num_actors, nodes)
        there = f"the cache '{run.cache.path}' holds {manifest.rows:,} samples"
    estimate = None if store is None else read_estimate(store)
    origin, rows = "measured on a few batches", float(ROW_BYTES)
    if estimate is None:
        there = there or _pictures_there(run.data)
        estimate = _by_formula(run, grid)
        origin = f"formulas, in {dtype_name(run.zoo.dtype)}"
        if not estimate.cost.seconds_together:
            origin = "formulas, which know no hours"
    else:
        assert store is not None
        there = there or f"the estimate is of {estimate.samples:,} samples"
        files = store.list(SHARD_FOLDER).items()
        rows = sum(size for path, size in files if f".{ROWS}." in path) / estimate.samples
        estimate = _scaled(estimate, cluster.samples, run.cache.num_actors)
    groups = {group: estimate.bytes(group) for group in estimate.cost.bytes_per_sample}
    known = bool(estimate.cost.seconds_together)
    return CachePlan(
        origin=origin,
        samples=estimate.samples,
        shards=estimate.shards,
        grid=grid,
        bytes={ROWS: rows * estimate.samples, **groups},
        seconds_per_sample=estimate.cost.seconds_per_sample,
        seconds_together=estimate.cost.seconds_together,
        hours=estimate.hours if known else None,
        actors=estimate.actors,
        nodes=nodes,
        note=_note(there, cluster.samples),
    )


def _note(there: str, samples: int) -> str:
    return f"{there}; planned are cluster.samples = {samples:,}" if there and samples else ""


def _pictures_there(data: DataConfig) -> str:
    """What a local folder of picture files holds; empty where that is not quickly known."""
    if data.format not in ("auto", "folder") or not os.path.isdir(data.folder):
        return ""
    names = (name.lower() for _, _, files in os.walk(data.folder) for name in files)
    found = list(islice((name for name in names if name.endswith(SUFFIXES)), MOST_COUNTED + 1))
    return f"'{data.folder}' holds {len(found):,} pictures" if len(found) <= MOST_COUNTED else ""


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


def _nodes(actors: int, cache: CacheConfig, cluster: ClusterConfig) -> int:
    """That hold the actors."""
    gpus, cpus = cluster.gpus_per_node, cluster.cpus_per_node
    each = actors
    if cache.gpus_per_actor:
        each = min(each, _fit(gpus, cache.gpus_per_actor))
    if cache.cpus_per_actor and cpus:
        each = min(each, int(cpus / cache.cpus_per_actor))
    if each * cluster.nodes < actors:
        raise ConfigError(
            f"cache.num_actors = {actors} do not fit {cluster.nodes} nodes of "
            f"{cluster.gpus_per_node} GPUs and {cluster.cpus_per_node or 'unstated'} CPUs, which "
            f"hold {each} each: lower cache.num_actors, cache.cpus_per_actor or "
            f"cache.gpus_per_actor, or state more nodes"
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


def _by_formula(run: RunConfig, grid: tuple[int, int]) -> Estimate:
    """Bytes from shapes; seconds from FLOPs, where the models are the published ones."""
    model, cluster = run.model, run.cluster
    if not cluster.samples:
        raise ConfigError(
            "the number of samples is not known: set cluster.samples, or let --measure look at "
            "the pictures"
        )
    buckets = len(default_buckets())
    every_token = model.text_padding == "encoder"
    tokens = model.max_text_length if every_token else cluster.caption_tokens
    text = 2 * (min(tokens, model.max_text_length) * model.t5_hidden_size)
    sizes = {
        "latents": 2.0 * model.in_channels * grid[0] * grid[1],
        "text": text + 2 * model.pooled_projection_dim + (0 if every_token else 8),
    }
    if run.cache.extract_lune:
        sizes["lune"] = 2 * buckets * model.lune_expert_dim
    if run.cache.extract_sol:
        sizes["sol"] = 2 * buckets * (4 + SPATIAL_SIZE**2)
    seconds, together = _encoding_seconds(run, sizes.keys())
    shards = -(-cluster.samples // max(1, round(SHARD_FILL * run.cache.rows_per_shard)))
    cost = Cost(
        {group: KEY_BYTES + value for group, value in sizes.items()},
        dict.fromkeys(sizes, FILE_BYTES),
        seconds,
        together,
        0.0,
        0,
        0,
    )
    actors = min(run.cache.num_actors, shards)
    here = (run.data.width, run.data.height)
    size = f"{run.data.width} x {run.data.height}"
    return Estimate(cluster.samples, shards, actors, {size: cluster.samples}, here, cost)


def _encoding_seconds(run: RunConfig, groups: Collection[str]) -> tuple[dict[str, float], float]:
    """Of a sample's groups alone, and of all together; nothing where models or speed are unknown.

    The teachers' latents are encoded once for both.
    """
    cache, buckets = run.cache, len(default_buckets())
    speed = run.cluster.speed(run.zoo.dtype, on_gpu=cache.gpus_per_actor > 0)
    if os.path.isdir(run.zoo.experts_repo) or not all(speed):
        return {}, 0.0
    pixels = run.data.width * run.data.height
    share = min(1.0, cache.gpus_per_actor or 1.0)
    vae = encoders.VAE.at(pixels).seconds(speed)
    teachers = {
        "lune": buckets * encoders.LUNE.at(pixels).seconds(speed),
        "sol": buckets * encoders.SOL.at(pixels).seconds(speed),
    }
    asked = {group: value for group, value in teachers.items() if group in groups}
    text = encoders.TEXT.seconds(speed)
    alone = {"latents": vae, "text": text, **{key: vae + value for key, value in asked.items()}}
    together = vae + text + sum(asked.values()) + (vae if asked else 0.0)
    return {group: value / share for group, value in alone.items()}, together / share


def _vae_channels(zoo: ZooConfig) -> list[int]:
    """Channels of the student's VAE by level: each but the last halves a picture's sides."""
    for place in (Path(zoo.vae_repo, "vae", "config.json"), Path(zoo.vae_repo, "config.json")):
        if place.is_file():
            return json.loads(place.read_text())["block_out_channels"]
    return [128, 256, 512, 512]  # FLUX's
