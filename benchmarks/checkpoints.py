"""What a checkpoint costs training, by how it is written: ``python benchmarks/checkpoints.py``.

The training loop trains a wide toy preset (106M parameters in fp32; with the EMA and AdamW's two
moments, 1.7 GB a checkpoint) on one small synthetic batch, with ``async_checkpoints`` off and on in
turns, and writes to ``--directory``. After the first steps of a turn, which are not counted, follow
``--checkpoints`` periods of a step with its checkpoint and ``--period`` - 1 more.

    stall_seconds   what the loop stood still for the checkpoint, by the clock
    cost_seconds    the period's time less that of as many median steps: the stall, and what the
                    thread takes from the steps beside it; other load on the machine is in it too
    written_within  steps after which the checkpoint was seen to be whole; a period must be more
                    than twice as long for its median to be that of plain steps

torch gets one thread less than there are cores, as a run with a GPU leaves cores to the writer.

Figures are medians over a way's periods; ``ratio`` is asynchronous over synchronous. Prints JSON;
the loop's log goes to stderr.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import add_json_option, record

from tinyflux.data.batches import StepData, TrainBatch
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset
from tinyflux.run_dir import CHECKPOINT_STATE
from tinyflux.trainer.checkpoint_folder import step_directory
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.recorder import CheckpointKind, Recorder, RunPaths
from tinyflux.util.buckets import default_buckets


def student(width: int) -> TinyFluxConfig:
    """The toy preset, ``width`` wide."""
    config = preset("toy")
    return dataclasses.replace(
        config, hidden_size=width, num_attention_heads=width // config.attention_head_dim
    )


def synthetic(config: TinyFluxConfig) -> TrainBatch:
    """One sample of 4 x 4 latents: small, so that a step is mostly the optimizer's."""
    return TrainBatch(
        latents=torch.randn(1, config.in_channels, 4, 4),
        t5_embeds=torch.randn(1, config.max_text_length, config.t5_hidden_size),
        clip_pooled=torch.randn(1, config.pooled_projection_dim),
        positions=torch.arange(1),
    )


class TimedLoop(TrainLoop):
    """Notes how long each checkpoint holds up the loop."""

    stalls: list[float]

    def save(self, kind: CheckpointKind, upload: bool) -> None:
        started = time.perf_counter()
        super().save(kind, upload)
        self.stalls.append(time.perf_counter() - started)


class Run:
    """One student and its engine, which both ways of writing train in turns."""

    def __init__(self, config: TinyFluxConfig, period: int, checkpoints: int):
        self.model = TinyFluxDeep(config)
        self.trainer = TrainerConfig(
            total_steps=period * (checkpoints + 1),
            save_every_steps=period,
            keep_last_n_steps=1,
            log_every=period,
            sample_every=None,
            enable_lune=False,
            enable_sol=False,
            dtype=torch.float32,
        )
        self.engine = TorchEngine(self.model, self.trainer)
        self.ema = EMA(self.model, self.trainer.ema_decay)
        self.batch = synthetic(config)
        self.period = period

    def turn(self, wanted: bool, root: Path) -> list[dict[str, float]]:
        """Train once through; the figures of each counted period."""
        # Between steps the loop asks for data, so the times of its asking are the steps'.
        times: list[float] = []
        written: dict[int, int] = {}

        def data() -> Iterator[StepData]:
            while True:
                done = len(times)  # steps
                times.append(time.perf_counter())
                saved = done - done % self.period
                if saved and (step_directory(root, saved) / CHECKPOINT_STATE).exists():
                    written.setdefault(saved, done - saved)
                yield StepData([self.batch], done + 1, 0, done + 1, size=1)

        config = dataclasses.replace(self.trainer, async_checkpoints=wanted)
        paths = RunPaths(
            root, root / "samples", root / "tb", root / "metrics.jsonl", root / "best.json"
        )
        loop = TimedLoop(
            self.engine,
            config,
            TrainerState(),
            self.ema,
            (self.batch.t5_embeds[0], self.batch.clip_pooled[0]),
            default_buckets(),
            Recorder(config, paths),
        )
        loop.stalls = []
        loop.run(data(), ahead=False)
        steps = [after - before for before, after in pairwise(times)]
        return [
            self._figures(
                loop.stalls[saved // self.period - 1],
                steps[saved - 1 : saved - 1 + self.period],
                written.get(saved, self.period),
            )
            for saved in range(self.period, self.trainer.total_steps, self.period)
        ]

    def _figures(self, stall: float, steps: list[float], written: int) -> dict[str, float]:
        plain = statistics.median(steps)
        return {
            "stall_seconds": stall,
            "cost_seconds": sum(steps) - self.period * plain,
            "step_seconds": plain,
            "written_within": written,
        }


def summary(periods: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure, and every stall."""
    medians = {
        name: round(statistics.median(period[name] for period in periods), 3) for name in periods[0]
    }
    return {**medians, "stalls": [round(period["stall_seconds"], 3) for period in periods]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument(
        "--period", type=int, default=30, help="steps from checkpoint to checkpoint"
    )
    parser.add_argument("--checkpoints", type=int, default=2, help="counted ones of each turn")
    parser.add_argument("--turns", type=int, default=1, help="of each way")
    parser.add_argument("--directory", help="where to write; left out, the system's temporary one")
    add_json_option(parser)
    arguments = parser.parse_args()

    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    torch.manual_seed(0)
    run = Run(student(arguments.width), arguments.period, arguments.checkpoints)
    periods: dict[str, list[dict[str, float]]] = {"synchronous": [], "asynchronous": []}
    for _ in range(arguments.turns):
        for name, found in periods.items():
            with (
                tempfile.TemporaryDirectory(dir=arguments.directory) as root,
                redirect_stdout(sys.stderr),
            ):
                found += run.turn(name == "asynchronous", Path(root))
    ways = {name: summary(found) for name, found in periods.items()}
    result = {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        **ways,
        "ratio": {
            name: round(ways["asynchronous"][name] / ways["synchronous"][name], 3)
            for name in ("stall_seconds", "cost_seconds")
        },
    }
    record(result, arguments.json)


if __name__ == "__main__":
    main()
