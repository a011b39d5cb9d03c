"""A plan against what the run then took: ``python benchmarks/plan_against_actual.py``.

The demo's pictures and the toy preset: ``tinyflux plan --measure --calibrate``, then the cache
is built on Ray and a student is trained on it, and both are compared. Prints JSON: planned, actual
and planned over actual of the cache's bytes and seconds by actor, of a checkpoint's bytes and of a
step's seconds. Progress goes to stderr.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import ray
import torch
from record import add_json_option, record

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.receipts import all_receipts
from tinyflux.cache.store import open_store
from tinyflux.config import RunConfig
from tinyflux.distributed.build import build_cache
from tinyflux.distributed.config import ClusterConfig, WorkersConfig
from tinyflux.distributed.train import train
from tinyflux.model.config import ZooConfig
from tinyflux.model.presets import preset
from tinyflux.plan.plan import make_plan
from tinyflux.toy.icons import SHIPPED as ICONS
from tinyflux.toy.icons import TRAIN, in_demo, read_icons, write_icon_files
from tinyflux.toy.world import SHIPPED
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics


def a_run(root: Path, steps: int, workers: int) -> RunConfig:
    """Steps of 32 samples, reported by tens, and a checkpoint at the end."""
    world = str(SHIPPED)
    return RunConfig(
        run_dir=str(root / "run"),
        data=DataConfig(folder=str(root / "pictures"), height=32, width=32),
        zoo=ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu"),
        cache=CacheConfig(path=str(root / "cache"), rows_per_shard=48, batch_size=16),
        model=preset("toy"),
        trainer=TrainerConfig(
            batch_size=32,
            gradient_accumulation=1,
            total_steps=steps,
            save_every_steps=steps,
            sample_every=None,
            log_every=10,
            dtype=torch.float32,
        ),
        workers=WorkersConfig(num_workers=workers),
        cluster=ClusterConfig(cpus_per_node=2),
    )


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        root = Path(folder)
        write_icon_files(root / "pictures", filter(in_demo, read_icons(ICONS, TRAIN)))
        run = a_run(root, arguments.steps, arguments.workers)
        plan = make_plan(run, measured=True, calibrated=True)
        print(plan)
        started = time.perf_counter()
        manifest = build_cache(run.data, run.zoo, run.cache, run.model)
        cache_seconds = time.perf_counter() - started
        spent = sum(receipt.seconds for receipt in all_receipts(open_store(run.cache.path)))
        started = time.perf_counter()
        train(run)
        train_seconds = time.perf_counter() - started
        ray.shutdown()
        records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
        rates = [record["samples_per_s"] for record in records if "samples_per_s" in record]
        (checkpoint,) = (Path(run.run_dir) / "checkpoints").iterdir()
        checkpoint_bytes = folder_bytes(checkpoint)

    sizes: dict[str, int] = {}
    for shard in manifest.shards:
        for group, file in shard.files.items():
            sizes[group] = sizes.get(group, 0) + file.bytes
    assert plan.cache.hours is not None
    pairs = {
        **{f"{group}_bytes": (plan.cache.bytes[group], size) for group, size in sizes.items()},
        "cache_bytes": (plan.cache.total_bytes, sum(sizes.values())),
        "encoding_seconds": (plan.cache.hours * 3600, spent),
        "checkpoint_bytes": (plan.training.checkpoint_bytes, checkpoint_bytes),
        "step_seconds": (
            plan.training.step_seconds,
            run.trainer.batch_size / statistics.median(rates[1:]),
        ),
    }
    result = {
        "workers": arguments.workers,
        **{
            name: {
                "planned": round(planned, 4),
                "actual": round(actual, 4),
                "planned_over_actual": round(planned / actual, 3),
            }
            for name, (planned, actual) in pairs.items()
        },
        # With Ray's start, which no plan counts: it is the same for hours of work.
        "whole_jobs_seconds": {"cache": round(cache_seconds, 1), "train": round(train_seconds, 1)},
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
