"""The loop around the training step: logs, checkpoints, validation, samples.

The library's Trainer and the Ray Train worker both run it. They differ in the engine and in where
batches come from.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tinyflux.errors import TrainingError
from tinyflux.inference.sampler import image_grid, sample_path, write_samples
from tinyflux.trainer.checkpoint import (
    CheckpointData,
    TrainerState,
    epoch_directory,
    prune,
    save_checkpoint,
    step_directory,
)
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine
from tinyflux.trainer.evaluation import EvaluationRequest, Evaluations
from tinyflux.trainer.metrics import MetricLog
from tinyflux.trainer.sharding import rank_and_world
from tinyflux.trainer.step import TrainBatch, training_loss
from tinyflux.trainer.trackers import Tracker, open_trackers
from tinyflux.trainer.upload import Uploader
from tinyflux.trainer.writer import BackgroundWriter
from tinyflux.util.config import to_dict
from tinyflux.util.files import full_disk_ends_run


@dataclass
class RunPaths:
    """Where a run writes."""

    checkpoints: Path
    samples: Path
    tensorboard: Path
    metrics: Path


@dataclass
class StepData:
    """What one optimizer step trains on, and the place in the data after it.

    Attributes:
        micro_batches: this worker's share.
        samples_seen: samples of the run over all workers, these included.
        epoch: complete passes. epoch_batches: micro-batches of the pass under way.
        size: samples of the step over all workers.
    """

    micro_batches: list[TrainBatch]
    samples_seen: int
    epoch: int
    epoch_batches: int
    size: int


class TrainLoop:
    """Runs optimizer steps and what comes with them.

    Args:
        state: where the run stands; kept current.
        ema: this worker's part of it: one of ``engine.shard()``.
        paths: where the main worker writes; None on the others, which write nothing.
        null_text, t_buckets: see :func:`tinyflux.trainer.step.training_loss`.
        evaluations: on the main worker; without it nothing is validated or drawn.
        trackers: told the run's numbers beside those of ``config.trackers``.
        saved: called after each checkpoint, in the thread that wrote it.
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainerConfig,
        state: TrainerState,
        ema: EMA,
        paths: RunPaths | None,
        null_text: tuple[Tensor, Tensor] | None,
        t_buckets: Tensor,
        evaluations: Evaluations | None = None,
        trackers: Sequence[Tracker] = (),
        saved: Callable[[], None] = lambda: None,
    ):
        self.engine, self.config, self.state, self.ema = engine, config, state, ema
        self.paths, self.evaluations, self._trackers = paths, evaluations, trackers
        self._saved = saved
        self._world = rank_and_world()[1]
        self.t_buckets = t_buckets.to(engine.device)
        self.null_text = null_text and tuple(part.to(engine.device) for part in null_text)
        self._log: MetricLog | None = None
        self._uploader: Uploader | None = None
        self._writer: BackgroundWriter | None = None
        self._sums = torch.zeros(5, device=engine.device)  # losses, and of how many steps
        self._steps = self._samples = 0
        self._wait = self._busy = 0.0
        self._grid = (64, 64)  # that of the latest batch
        install(engine.model)

    def run(self, data: Iterable[StepData]) -> None:
        """Train on ``data`` until it ends or ``config.total_steps`` are done.

        Raises:
            TrainingError: gradients stayed non-finite, or the disk is full.
            CheckpointError: a checkpoint could not be written; at the latest when the run ends.
        """
        if self.state.step >= self.config.total_steps:
            return
        with ExitStack() as stack:
            if self.paths is not None:
                stack.enter_context(full_disk_ends_run(str(self.paths.metrics.parent)))
                stack.callback(self._close)
                self._open(self.paths)
            self._train(data)
            if self._writer is not None:
                self._writer.wait()

    def _open(self, paths: RunPaths) -> None:
        config, root = self.config, paths.metrics.parent
        trackers = open_trackers(
            config.trackers,
            root,
            paths.tensorboard,
            config.tracker_project,
            to_dict(config),
            self.state.step,
        )
        self._log = MetricLog(paths.metrics, [*trackers, *self._trackers], self.state.step)
        if self.config.hf_repo_id is not None:
            self._uploader = Uploader(self.config.hf_repo_id, paths.checkpoints / ".uploads")
        if self.config.async_checkpoints:
            self._writer = BackgroundWriter()

    def _close(self) -> None:
        # First of all: a checkpoint that is being written may still be uploaded.
        if self._writer is not None:
            self._writer.close()
        log, uploader = self._log, self._uploader
        self._log = self._uploader = self._writer = None
        if uploader is not None:
            uploader.close()
        if log is not None:
            log.close()

    def _train(self, data: Iterable[StepData]) -> None:
        self.engine.model.train()
        begun = False
        started = time.perf_counter()
        for item in data:
            self._grid = item.micro_batches[0].grid
            if not begun:
                begun = True
                self._evaluate_if_missing()
            if self._writer is not None:
                self._writer.check()
            ready = time.perf_counter()
            norm = self._step(item)
            done = time.perf_counter()
            self._wait += ready - started
            self._busy += done - started
            self._after_step(item, norm)
            if self.state.step >= self.config.total_steps:
                break
            started = time.perf_counter()
        self._take_evaluations(wait=True)

    def _step(self, item: StepData) -> Tensor:
        """One optimizer step; the gradient's norm."""
        losses = torch.zeros(4, device=self.engine.device)
        for index, batch in enumerate(item.micro_batches):
            loss = training_loss(
                self.engine.model,
                batch.to(self.engine.device),
                self.config,
                self.state.step,
                self.null_text,  # type: ignore[arg-type]
                self.t_buckets,
                velocity=self.engine.forward,
            )
            # The mean over the global batch, however it is cut: workers are averaged afterwards.
            share = len(batch) * self._world / item.size
            self.engine.backward(loss.total * share, last=index + 1 == len(item.micro_batches))
            losses += loss.stack() * share
        norm = self.engine.step(self.config.lr_at(self.state.step))
        # A skipped step is no part of the means.
        taken = norm.isfinite()
        self._sums += torch.cat([torch.where(taken, losses, 0.0), taken.reshape(1).float()])
        self.ema.update(self.engine.shard(), self.config.ema_decay_at(self.state.step))
        return norm

    def _after_step(self, item: StepData, norm: Tensor) -> None:
        config, state = self.config, self.state
        new_epoch = item.epoch > state.epoch
        self._samples += item.samples_seen - state.samples_seen
        self._steps += 1
        state.step += 1
        state.samples_seen = item.samples_seen
        state.epoch, state.epoch_batches = item.epoch, item.epoch_batches

        last = state.step >= config.total_steps
        if last or state.step % config.log_every == 0:
            self._report(norm)
        if last or state.step % config.max_nonfinite_steps == 0:
            self._check_finite()
        if _due(state.step, config.save_every_steps) or last:
            self._save("step", _due(state.step, config.upload_every_steps))
        elif _due(state.step, config.upload_every_steps):
            self._save("step", True)
        if new_epoch:
            upload = _due(state.epoch, config.upload_every_epochs)
            if upload or _due(state.epoch, config.save_every_epochs):
                self._save("epoch", upload)
        validate = config.validate_every is not None and (
            last or _due(state.step, config.validate_every)
        )
        self._evaluate(validate, _due(state.step, config.sample_every))
        self._take_evaluations()

    def _report(self, norm: Tensor) -> None:
        """Log the mean losses since the last report; the one place that waits for the device."""
        config, state = self.config, self.state
        sums = self.engine.average(self._sums)
        *losses, norm_value = torch.cat([sums[:4] / sums[4], norm.reshape(1).to(sums)]).tolist()
        total, main, lune, sol = losses  # NaN if every step was skipped
        rate = self._samples / max(self._busy, 1e-9)
        seconds_left = (config.total_steps - state.step) * self._busy / max(1, self._steps)
        skipped, _ = self.engine.skips.read()
        if self._log is not None:
            self._log.write(
                state.step,
                {
                    "loss": total,
                    "loss_main": main,
                    "loss_lune": lune,
                    "loss_sol": sol,
                    "lr": config.lr_at(state.step - 1),
                    "grad_norm": norm_value,
                    "samples_per_s": rate,
                    "data_wait": self._wait / max(self._busy, 1e-9),
                    "skipped_steps": skipped,
                },
            )
            print(
                f"step {state.step}/{config.total_steps}  loss {total:.4f}  "
                f"velocity {main:.4f}  lune {lune:.4f}  sol {sol:.4f}  "
                f"{rate:.1f} samples/s  {_duration(seconds_left)} left",
                flush=True,
            )
        self._sums.zero_()
        self._steps = self._samples = 0
        self._wait = self._busy = 0.0

    def _check_finite(self) -> None:
        skipped, longest = self.engine.skips.read()
        if longest >= self.config.max_nonfinite_steps:
            raise TrainingError(
                f"the gradient was not finite for {longest} steps in a row (until step "
                f"{self.state.step}; {skipped} skipped in all): lower trainer.learning_rate, "
                "or look for broken samples in the cache"
            )

    def _save(self, kind: str, upload: bool) -> None:
        """Write a checkpoint, delete old ones, and upload if asked; all workers take part.

        With a writer only the copies are made here; the rest happens in its thread.
        """
        # A run that continues from here looks at this step's weights again, but at no earlier ones.
        self._take_evaluations(wait=True)
        if self._writer is not None:
            self._writer.wait()  # before the next copies are made, so that there is one set
        optimizer = self.engine.optimizer_state()
        weights, shadow = self.whole_weights()
        if self.paths is None or optimizer is None or weights is None or shadow is None:
            return
        root = self.paths.checkpoints
        if kind == "step":
            path, keep = step_directory(root, self.state.step), self.config.keep_last_n_steps
        else:
            path, keep = epoch_directory(root, self.state.epoch), self.config.keep_last_n_epochs
        state = replace(self.state, seed=self.config.seed, trainer=to_dict(self.config))
        contents = CheckpointData(
            self.engine.model, weights, shadow, self.ema.decay, optimizer, state
        )
        uploader = self._uploader if upload else None
        if self._writer is None:
            self._write(path, contents, keep, uploader)
        else:
            write = partial(self._write, path, contents.snapshot(), keep, uploader)
            self._writer.submit(write)

    def _write(
        self, path: Path, contents: CheckpointData, keep: int, uploader: Uploader | None
    ) -> None:
        save_checkpoint(path, contents)
        prune(path, keep)
        if uploader is not None:
            uploader.submit(path, path.name)
        self._saved()

    def whole_weights(self) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor] | None]:
        """The whole weights and the whole EMA, on rank 0; called by all workers."""
        weights, averaged = self.engine.weights(), self.engine.gather(self.ema.shadow)
        if weights is None or averaged is None:
            return None, None
        # What is not trained is in no worker's part of the EMA.
        return weights, {**weights, **averaged}

    def _evaluate_if_missing(self) -> None:
        """Look at the first weights, or at those of a step whose figures were lost with a kill."""
        config, step = self.config, self.state.step
        validate = config.validate_every is not None and step % config.validate_every == 0
        draw = _due(step, config.sample_every)
        if self._log is not None:
            validate = validate and not self._log.has(step, "val_velocity")
            draw = draw and not sample_path(self._samples_dir(), step).exists()
        # Only the main worker knows, and all must take part.
        known = torch.tensor([validate, draw], dtype=torch.float32, device=self.engine.device)
        known *= 1.0 if self.paths is not None else 0.0
        validate, draw = (self.engine.average(known) > 0).tolist()
        self._evaluate(validate, draw)
        self._take_evaluations()

    def _evaluate(self, validate: bool, draw: bool) -> None:
        """Have the weights looked at; all workers take part."""
        draw = draw and bool(self.config.sample_prompts)
        if not (validate or draw):
            return
        weights, shadow = self.whole_weights()
        if self.evaluations is None or weights is None or shadow is None:
            return
        self.evaluations.submit(
            EvaluationRequest(self.state.step, validate, draw, self._grid), weights, shadow
        )

    def _take_evaluations(self, wait: bool = False) -> None:
        """Log what has been found."""
        if self.evaluations is None or self._log is None:
            return
        for found in self.evaluations.take(wait):
            if found.values:
                self._log.write(found.step, found.values)
                values = (f"{n.removeprefix('val_')} {v:.4f}" for n, v in found.values.items())
                print(f"step {found.step}  held out: {'  '.join(values)}", flush=True)
            if found.images is not None:
                prompts, directory = self.config.sample_prompts, self._samples_dir()
                path = write_samples(found.images, prompts, directory, found.step)
                self._log.picture(found.step, "samples", image_grid(found.images))
                print(f"step {found.step}  samples: {path}", flush=True)

    def _samples_dir(self) -> Path:
        assert self.paths is not None
        return self.paths.samples


def _due(count: int, every: int | None) -> bool:
    return every is not None and count > 0 and count % every == 0


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
