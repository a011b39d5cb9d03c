"""The training job against a bare PyTorch loop: ``python benchmarks/train_loop.py``.

Both train the toy preset (``--width`` makes it wider) on the same batches of the demo's pictures,
from the same first weights, with the same losses, on as many threads. The job is the one that
``ray_jobs/train.py`` runs: one Ray Train worker, DeepSpeed, batches read from the cache, EMA and
logs. The bare loop has its batches in memory and does forward, backward, clipping and
``torch.optim.AdamW`` (fused), nothing else.

They take turns, bare first and last, because a shared machine's speed drifts: a round's ratio is
the job's rate over the mean of the bare rates before and after it. A rate is the median over
reports of ``--log-every`` steps, without the first of each turn, so it holds neither start-up nor
warm-up. The job's is ``samples_per_s`` of its ``metrics.jsonl``: waiting for data and the step
count, writing logs and checkpoints between steps does not.

Prints JSON; progress goes to stderr.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import ray
import torch
from record import add_json_option, record

from tinyflux.cache.config import CacheConfig, DataConfig, MixSource
from tinyflux.config import RunConfig
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader
from tinyflux.distributed.build import build_cache
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.train import train
from tinyflux.model.config import TinyFluxConfig, ZooConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.toy.icons import SHIPPED as ICONS
from tinyflux.toy.icons import TRAIN, in_demo, read_icons, write_icon_files
from tinyflux.toy.world import SHIPPED
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.schedules import lr_at
from tinyflux.trainer.step import training_loss


def student(width: int) -> TinyFluxConfig:
    """The toy preset, ``width`` wide."""
    config = preset("toy")
    heads = width // config.attention_head_dim
    return dataclasses.replace(config, hidden_size=width, num_attention_heads=heads)


def build(run: RunConfig, root: Path) -> None:
    """The demo's pictures and their cache."""
    run.data = DataConfig(folder=str(root / "pictures"), height=32, width=32)
    write_icon_files(root / "pictures", filter(in_demo, read_icons(ICONS, TRAIN)))
    build_cache(run.data, run.zoo, run.cache, run.model)
    ray.shutdown()


class BareLoop:
    """What anyone would write first, with every batch of the run in memory."""

    def __init__(self, run: RunConfig, steps: int):
        self.config = run.trainer
        dataset = CacheMixture([MixSource(run.cache.path)])
        reader = StepReader(
            dataset,
            dataset.held_out(0.0),
            self.config.batch_size,
            self.config.gradient_accumulation,
            self.config.seed,
        )
        self.batches = [item.micro_batches[0] for item in islice(reader.steps(), steps)]
        self.null_text, self.t_buckets = dataset.null_text, dataset.t_buckets
        torch.manual_seed(self.config.seed)
        self.model = TinyFluxDeep(run.model).train()
        install(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.step = 0

    def turn(self, steps: int) -> float:
        """Train ``steps`` more; samples per second."""
        rates = []
        for _ in range(steps // self.config.log_every):
            started = time.perf_counter()
            for _ in range(self.config.log_every):
                self._train()
            seconds = time.perf_counter() - started
            rates.append(self.config.batch_size * self.config.log_every / seconds)
        return statistics.median(rates[1:])

    def _train(self) -> None:
        # The turn after the job's last has no batches of its own.
        batch = self.batches[self.step % len(self.batches)]
        loss = training_loss(
            self.model, batch, self.config, self.step, self.null_text, self.t_buckets
        )
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.param_groups[0]["lr"] = lr_at(self.config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def job_turn(run: RunConfig, begun: int, steps: int) -> float:
    """Train ``steps`` more after ``begun`` with the job; samples per second."""
    run.trainer.total_steps = begun + steps
    train(run)
    ray.shutdown()  # the bare loop has the machine to itself
    records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    rates: list[float] = [record["samples_per_s"] for record in records if record["step"] > begun]
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", default="deepspeed", choices=["deepspeed", "torch"])
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of either, and the worker's CPUs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--steps", type=int, default=60, help="per turn")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory(prefix="tinyflux-") as folder, redirect_stdout(sys.stderr):
        root, world = Path(folder), str(SHIPPED)
        run = RunConfig(
            run_dir=str(root / "run"),
            zoo=ZooConfig(world, f"{world}/t5", f"{world}/clip", world, world, "cpu"),
            cache=CacheConfig(path=str(root / "cache"), rows_per_shard=48),
            model=student(arguments.width),
            trainer=TrainerConfig(
                batch_size=arguments.batch_size,
                gradient_accumulation=1,
                lr_scheduler="constant",
                save_every_steps=None,
                log_every=arguments.log_every,
                val_fraction=0.0,
                dtype=torch.float32,
            ),
            workers=WorkersConfig(
                cpus_per_worker=arguments.threads,
                engine=arguments.engine,
                zero_stage=arguments.zero_stage,
            ),
        )
        build(run, root)
        loop = BareLoop(run, steps * rounds)
        bare, job = [loop.turn(steps)], []
        for index in range(rounds):
            job.append(job_turn(run, index * steps, steps))
            bare.append(loop.turn(steps))

    ratios = [2 * job[index] / (bare[index] + bare[index + 1]) for index in range(rounds)]
    result = {
        "engine": arguments.engine,
        "zero_stage": arguments.zero_stage,
        "threads": arguments.threads,
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
        "batch_size": arguments.batch_size,
        "bare_seconds_per_step": round(arguments.batch_size / statistics.median(bare), 4),
        "bare_samples_per_s": [round(rate, 2) for rate in bare],
        "job_samples_per_s": [round(rate, 2) for rate in job],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
