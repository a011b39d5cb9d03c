"""What a cache will take, from shapes and from FLOPs, where nothing was measured."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from tinyflux.cache.estimate import Cost, Estimate
from tinyflux.cache.schema import PIXEL_GROUPS
from tinyflux.cache.variants import variants_of
from tinyflux.config import RunConfig
from tinyflux.errors import ConfigError
from tinyflux.model.config import ZooConfig
from tinyflux.model.teachers import SPATIAL_SIZE
from tinyflux.plan import encoders
from tinyflux.util.buckets import default_buckets

KEY_BYTES = 36  # 32 hex digits and their length
FILE_BYTES = 860.0  # of Parquet around the rows of a file
# Shards end where their keys say: between a quarter of the most and all, at this on average.
SHARD_FILL = 0.64


def latent_grid(run: RunConfig) -> tuple[int, int]:
    """Height and width in latents of the run's pictures."""
    factor = 2 ** (len(_vae_channels(run.zoo)) - 1)
    return run.data.height // factor, run.data.width // factor


def estimate_by_formula(run: RunConfig) -> Estimate:
    """Bytes from shapes; seconds from FLOPs, where the models are the published ones.

    Raises:
        ConfigError: nobody said how many samples there are.
    """
    cluster = run.cluster
    if not cluster.samples:
        raise ConfigError(
            "the number of samples is not known: set cluster.samples, or let --measure look at "
            "the pictures"
        )
    row_bytes = _row_bytes(run)
    seconds, together = _encoding_seconds(run, row_bytes.keys())
    shards = -(-cluster.samples // max(1, round(SHARD_FILL * run.cache.rows_per_shard)))
    cost = Cost(
        {group: KEY_BYTES + count for group, count in row_bytes.items()},
        dict.fromkeys(row_bytes, FILE_BYTES),
        seconds,
        together,
        0.0,
        0,
        0,
    )
    return Estimate(
        cluster.samples,
        shards,
        min(run.cache.num_actors, shards),
        {f"{run.data.width} x {run.data.height}": cluster.samples},
        (run.data.width, run.data.height),
        cost,
    )


def _row_bytes(run: RunConfig) -> dict[str, float]:
    """Bytes of a sample's columns by group, its key apart."""
    model, buckets = run.model, len(default_buckets())
    height, width = latent_grid(run)
    every_token = model.text_padding == "encoder"
    tokens = model.max_text_length if every_token else run.cluster.caption_tokens
    text = 2 * (min(tokens, model.max_text_length) * model.t5_hidden_size)
    row_bytes = {
        "latents": 2.0 * model.in_channels * height * width,
        "text": text + 2 * model.pooled_projection_dim + (0 if every_token else 8),
    }
    if run.cache.extract_lune:
        row_bytes["lune"] = 2 * buckets * model.lune_expert_dim
    if run.cache.extract_sol:
        row_bytes["sol"] = 2 * buckets * (4 + SPATIAL_SIZE**2)
    return {**row_bytes, **_of_variants(run, row_bytes)}


def _of_variants(run: RunConfig, plain: Mapping[str, float]) -> dict[str, float]:
    """What the groups of pictures' other variants take, each as much as the plain one's."""
    return {
        f"{group}-{variant.name}": plain[group]
        for variant in variants_of(run.data.variants)
        for group in PIXEL_GROUPS
        if group in plain
    }


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
    each = vae + sum(asked.values()) + (vae if asked else 0.0)
    together = text + each * (1 + len(variants_of(run.data.variants)))
    alone.update(_of_variants(run, alone))
    return {group: value / share for group, value in alone.items()}, together / share


def _vae_channels(zoo: ZooConfig) -> list[int]:
    """Channels of the student's VAE by level: each but the last halves a picture's sides."""
    for place in (Path(zoo.vae_repo, "vae", "config.json"), Path(zoo.vae_repo, "config.json")):
        if place.is_file():
            channels: list[int] = json.loads(place.read_text())["block_out_channels"]
            return channels
    return [128, 256, 512, 512]  # FLUX's
