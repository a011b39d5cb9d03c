"""The training loop: optimizer steps, one after another.

The library's Trainer and the Ray Train worker both run it. They differ in the engine and in where
batches come from. What a run leaves beside its weights is the main worker's
:class:`~tinyflux.trainer.recorder.Recorder`'s.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from tinyflux.data.batches import StepData
from tinyflux.errors import TrainingError
from tinyflux.trainer.checkpoint import CheckpointData
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.due import Due
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import Engine
from tinyflux.trainer.evaluation import EvaluationRequest
from tinyflux.trainer.feed import Feed, ReadyStep
from tinyflux.trainer.meter import StepMeter
from tinyflux.trainer.power_ema import PowerEMA
from tinyflux.trainer.recorder import CheckpointKind, Recorder
from tinyflux.trainer.schedules import lr_at
from tinyflux.trainer.sharding import rank_and_world
from tinyflux.trainer.step import training_loss
from tinyflux.util.config import to_dict


class TrainLoop:
    """Runs optimizer steps, and has recorded what comes with them.

    Every worker decides alike what is due after a step, and takes part in gathering it; the main
    worker alone has a recorder.

    Args:
        state: where the run stands; kept current.
        ema: this worker's part of it: one of ``engine.shard()``.
        null_text, t_buckets: see :func:`tinyflux.trainer.step.training_loss`.
        recorder: the main worker's; None on the others, which write nothing.
        power_ema: this worker's part of the power-function averages; left out, there are none.
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainerConfig,
        state: TrainerState,
        ema: EMA,
        null_text: tuple[Tensor, Tensor] | None,
        t_buckets: Tensor,
        recorder: Recorder | None = None,
        power_ema: PowerEMA | None = None,
    ):
        self.engine, self.config, self.state, self.ema = engine, config, state, ema
        self.recorder = recorder
        self.power_ema = power_ema or PowerEMA({}, ())
        self.t_buckets = t_buckets.to(engine.device)
        self.null_text = null_text and (
            null_text[0].to(engine.device),
            null_text[1].to(engine.device),
        )
        self._world = rank_and_world()[1]
        self._feed = Feed(engine.device, config)
        self._meter = StepMeter(engine.device, [f"align_{one.name}" for one in config.align])
        self._grid = (64, 64)  # that of the latest batch
        install(engine.model)

    def run(self, data: Iterable[StepData], ahead: bool = True) -> None:
        """Train on ``data`` until it ends or ``config.total_steps`` are done.

        Args:
            ahead: have a thread read it and make it ready some steps ahead; else each step's is
                asked for when the one before is done.

        Raises:
            TrainingError: gradients stayed non-finite, or the disk is full.
            CheckpointError: a checkpoint could not be written; at the latest when the run ends.
        """
        if self.state.step >= self.config.total_steps:
            return
        recorder, step = self.recorder, self.state.step
        with nullcontext() if recorder is None else recorder.recording(step):
            with closing(self._feed.steps(data, ahead)) as steps:
                self._train(steps)
            if recorder is not None:
                recorder.take_evaluations(wait=True)

    def _train(self, steps: Iterable[ReadyStep]) -> None:
        self.engine.model.train()
        first = True
        self._meter.wait_for_data()
        for ready in steps:
            item = ready.data
            self._grid = item.micro_batches[0].grid
            if first:
                self._evaluate_if_missing()
                first = False
            if self.recorder is not None:
                self.recorder.check()
            self._meter.data_is_there()
            norm = self._step(ready)
            self._meter.step_is_done(item.samples_seen - self.state.samples_seen)
            self._conclude(self._advance(item), norm)
            if self.state.step >= self.config.total_steps:
                break
            self._meter.wait_for_data()

    def step(self, item: StepData) -> Tensor:
        """Change the weights and the EMA by one optimizer step; the gradient's norm, a scalar."""
        return self._step(self._feed.ready(item))

    def _step(self, ready: ReadyStep) -> Tensor:
        """See :meth:`step`; nothing here waits for the device but what an engine has to know."""
        item = ready.data
        losses = self._meter.no_losses()
        batches = zip(item.micro_batches, ready.conditions, strict=True)
        for index, (batch, conditions) in enumerate(batches):
            loss = training_loss(
                self.engine.model,
                batch,
                self.config,
                self.state.step,
                self.null_text,
                self.t_buckets,
                velocity=self.engine.forward,
                conditions=conditions,
            )
            # The mean over the global batch, however it is cut: workers are averaged afterwards.
            share = len(batch) * self._world / item.size
            self.engine.backward(loss.total * share, last=index + 1 == len(item.micro_batches))
            losses += loss.stack() * share
        norm = self.engine.step(lr_at(self.config, self.state.step))
        # A skipped step is no part of the means.
        self._meter.add_losses(losses, taken=norm.isfinite())
        shard = self.engine.shard()
        self.ema.update(shard, self.config.ema_decay_at(self.state.step))
        self.power_ema.update(shard, self.state.step + 1)
        return norm

    def _advance(self, item: StepData) -> Due:
        """Count a step that is done; what is due after it."""
        state = self.state
        finished_epoch = item.epoch if item.epoch > state.epoch else None
        state.step += 1
        state.samples_seen = item.samples_seen
        state.epoch, state.epoch_batches = item.epoch, item.epoch_batches
        state.passes = item.passes
        return Due.after(self.config, state.step, finished_epoch)

    def _conclude(self, due: Due, norm: Tensor) -> None:
        """Do what is due after a step; all workers take part."""
        if due.report:
            self._report(norm)
        if due.step_checkpoint:
            self.save("step", due.step_upload)
        if due.epoch_checkpoint:
            self.save("epoch", due.epoch_upload)
        self._evaluate(self._request(due))
        if self.recorder is not None:
            self.recorder.take_evaluations()

    def _report(self, norm: Tensor) -> None:
        """Record the means since the last report, for which the device is waited for.

        Raises:
            TrainingError: gradients stayed non-finite.
        """
        step = self.state.step
        sums = self.engine.average(self._meter.sums)
        skipped, longest = self.engine.skips.read()
        figures = self._meter.figures(sums, norm, lr_at(self.config, step - 1), skipped)
        if self.recorder is not None:
            self.recorder.report(step, figures)
        self._meter.reset()
        if longest >= self.config.max_nonfinite_steps:
            raise TrainingError(
                f"the gradient was not finite for {longest} steps in a row (until step {step}; "
                f"{skipped} skipped in all): lower trainer.learning_rate, or look for broken "
                "samples in the cache"
            )

    def save(self, kind: CheckpointKind, upload: bool) -> None:
        """Gather a checkpoint and have it written; all workers take part."""
        if self.recorder is not None:
            self.recorder.prepare_checkpoint()
        optimizer = self.engine.optimizer_state()
        weights, shadow = self.whole_weights()
        tracks = self.whole_tracks(weights)
        projectors = self.engine.projectors()
        if self.recorder is None or optimizer is None or weights is None or shadow is None:
            return
        state = replace(self.state, seed=self.config.seed, trainer=to_dict(self.config))
        contents = CheckpointData(
            self.engine.model,
            weights,
            shadow,
            self.ema.decay,
            optimizer,
            state,
            tracks,
            projectors or {},
        )
        self.recorder.save(kind, contents, upload)

    def whole_weights(self) -> tuple[Mapping[str, Tensor] | None, Mapping[str, Tensor] | None]:
        """The whole weights and the whole EMA, on rank 0; called by all workers."""
        weights, averaged = self.engine.weights(), self.engine.gather(self.ema.shadow)
        if weights is None or averaged is None:
            return None, None
        # What is not trained is in no worker's part of the EMA.
        return weights, {**weights, **averaged}

    def whole_tracks(
        self, weights: Mapping[str, Tensor] | None
    ) -> dict[float, Mapping[str, Tensor]]:
        """The whole power-function averages by length, on rank 0; called by all workers.

        Args:
            weights: the whole model's.
        """
        tracks = self.power_ema.tracks.items()
        gathered = {length: self.engine.gather(track.shadow) for length, track in tracks}
        return {
            length: {**(weights or {}), **averaged}
            for length, averaged in gathered.items()
            if averaged is not None
        }

    def _evaluate_if_missing(self) -> None:
        """Look at the first weights, or at those of a step whose figures were lost with a kill."""
        request = self._request(Due.before_first(self.config, self.state.step))
        missing = [0.0, 0.0, 0.0]  # only the main worker knows, and all must take part
        if self.recorder is not None:
            lacking = self.recorder.lacks(request)
            missing = [float(one) for one in (lacking.validate, lacking.draw, lacking.measure)]
        shares = self.engine.average(torch.tensor(missing, device=self.engine.device))
        validate, draw, measure = (shares > 0).tolist()
        self._evaluate(replace(request, validate=validate, draw=draw, measure=measure))
        if self.recorder is not None:
            self.recorder.take_evaluations()

    def _evaluate(self, request: EvaluationRequest) -> None:
        """Have the weights looked at, if anything is asked for; all workers take part."""
        if not request:
            return
        weights, shadow = self.whole_weights()
        if self.recorder is not None and weights is not None and shadow is not None:
            self.recorder.evaluate(request, weights, shadow)

    def _request(self, due: Due) -> EvaluationRequest:
        draw = due.draw and bool(self.config.sample_prompts)
        return EvaluationRequest(self.state.step, due.validate, draw, self._grid, due.measure)
