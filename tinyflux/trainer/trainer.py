"""Training in one process, from any DataLoader or from caches on disk."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from tinyflux.data.batches import HeldOut, StepData, StepSource
from tinyflux.errors import InputError, TrainingError
from tinyflux.inference.sampler import Sampler
from tinyflux.model.adapters import has_adapter
from tinyflux.model.weights import as_module
from tinyflux.trainer.adapter import begin_adapter, check_same_adapter, check_same_base
from tinyflux.trainer.checkpoint import (
    CheckpointData,
    load_checkpoint,
    save_checkpoint,
)
from tinyflux.trainer.checkpoint_state import TrainerState
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.distillation import SOL_SAMPLES
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.evaluation import Evaluator, InlineEvaluator
from tinyflux.trainer.init_from import FirstWeights, ThisMachine, begin_from, find_weights
from tinyflux.trainer.loader_steps import FeatureSource, LoaderSteps
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.null_text import find_null_text
from tinyflux.trainer.picture_figures import PictureFigures
from tinyflux.trainer.power_ema import PowerEMA
from tinyflux.trainer.projectors import check_same_targets, load_projectors, with_projectors
from tinyflux.trainer.recorder import Recorder, RunPaths
from tinyflux.util.buckets import default_buckets
from tinyflux.util.config import to_dict

__all__ = ["FeatureSource", "Trainer", "TrainerConfig"]

NO_DATA = "call Trainer.setup with a DataLoader before Trainer.train"
logger = logging.getLogger(__name__)


class Trainer:
    """Trains a student with plain torch.

    Each batch of a DataLoader is a micro-batch; ``gradient_accumulation`` of them make an
    optimizer step, and fewer at the end of a pass. The model stays on its device and is kept in
    fp32.
    """

    def __init__(self, model: nn.Module, config: TrainerConfig):
        self.model, self.config = as_module(model), config
        self._device = next(self.model.parameters()).device
        self._state = TrainerState(seed=config.seed)
        if config.adapter is not None:
            self._begin_adapter()
        self._module = with_projectors(self.model, config)
        self._engine = TorchEngine(self._module, config)
        self._ema = EMA(self.model, config.ema_decay)
        self._power_ema = PowerEMA(self.model, config.ema_lengths)
        self._source: StepSource | None = None
        self._loop: TrainLoop | None = None

    @property
    def ema(self) -> EMA:
        """The moving average of the weights."""
        return self._ema

    @property
    def current_step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    @property
    def loop(self) -> TrainLoop:
        """What runs the steps: its ``run`` trains on the data that it is given.

        Raises:
            TrainingError: :meth:`setup` was not called.
        """
        if self._loop is None:
            raise TrainingError(NO_DATA)
        return self._loop

    def setup(
        self,
        dataloader: DataLoader[Any] | StepSource,
        cache: FeatureSource | None = None,
        sampler: Sampler | None = None,
        null_text: tuple[Tensor, Tensor] | None = None,
        held_out: HeldOut | None = None,
        figures: PictureFigures | None = None,
    ) -> None:
        """Say what to train on.

        Args:
            dataloader: gives dictionaries with ``latents`` ``[B, C, H, W]``, ``t5_embeds``
                ``[B, L, D]``, ``clip_pooled`` ``[B, P]`` and, optional, ``mask`` ``[B, H, W]``,
                ``index`` and ``dataset_id`` ``[B]`` (needed with ``cache``, the latter where it
                holds more than one dataset). Or a StepSource, as a :class:`StepReader` of caches
                on disk, which has all of that.
            cache: teacher features by (index, dataset_id).
            sampler: draws ``config.sample_prompts``.
            null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, which
                dropped captions are trained on and inference is given; left out, the cache's, the
                dataset's (an EncodingCache, or Subset and ConcatDataset of some) or the sampler's
                zoo's.
            held_out: samples to validate on.
            figures: measures what the model's EMA draws, every ``config.evaluate_every`` steps;
                :func:`tinyflux.trainer.picture_figures.figures_of_pictures` makes it.

        A model with ``sol_standardize`` that has not been trained yet takes the mean and spread of
        Sol's features from ``cache``, if it has a MultiSourceCache's ``sol_examples``; else
        ``model.sol_units.measure`` has to be called before.

        Raises:
            InputError: captions are dropped and nobody knows the empty one's embeddings, or
                ``config.evaluate_every`` is set and nothing measures.
        """
        self._check_setup(sampler, figures)
        config = self.config
        source = _steps_of(dataloader, cache, config)
        if null_text is None and config.text_dropout > 0:
            null_text = find_null_text(source, sampler)
        self._source = source
        self._begin()
        self._measure_sol(source)
        buckets = default_buckets() if source.t_buckets is None else source.t_buckets
        evaluator = Evaluator(self.model, self._ema, config, buckets, held_out, sampler, figures)
        self._loop = TrainLoop(
            self._engine,
            config,
            self._state,
            self._ema,
            null_text,
            buckets,
            Recorder(config, RunPaths.stated(config), InlineEvaluator(evaluator)),
            self._power_ema,
        )

    def _check_setup(self, sampler: Sampler | None, figures: PictureFigures | None) -> None:
        """Refuse settings that what is given cannot meet."""
        if self.config.evaluate_every is not None and figures is None:
            raise InputError(
                "trainer.evaluate_every needs something that measures: pass Trainer.setup figures, "
                "as of figures_of_pictures"
            )
        if sampler is not None and sampler.device.type != self._device.type:
            raise InputError(
                f"the sampler draws on {sampler.device} and the trainer trains on {self._device}: "
                "make the Sampler with the device that the model is on"
            )

    def _begin_adapter(self) -> None:
        """Put an adapter on the weights of ``config.init_from``, before anything knows the model.

        Raises:
            InputError: the model has one.
        """
        config, places = self.config, ThisMachine()
        if has_adapter(self.model):
            raise InputError("the model has an adapter: give the Trainer a student without one")
        assert config.init_from is not None  # TrainerConfig sees to it
        file = find_weights(config.init_from, config.init_from_ema, places)
        self.model.float()
        self._state.init_from = asdict(begin_adapter(file, self.model, config, places))

    def _begin(self) -> None:
        """Take the weights that the run is to begin with, if it has not begun."""
        config = self.config
        if config.init_from is None or self._state.step or self._state.init_from:
            return
        places = ThisMachine()
        file = find_weights(config.init_from, config.init_from_ema, places)
        self._state.init_from = asdict(begin_from(file, self.model, config.init_from, places))
        shadow = EMA(self.model, config.ema_decay).shadow
        self._ema.load_state_dict({"decay": config.ema_decay, "shadow": shadow})

    def _measure_sol(self, source: StepSource) -> None:
        """Measure the units of Sol's features, once in a model's life."""
        units = self.model.sol_units if self.config.enable_sol else None
        if units is None or units.measured or source.t_buckets is None:
            return
        examples = source.sol_examples(SOL_SAMPLES)
        if examples is not None:
            device = units.map_std.device
            stats, spatial = (part.to(device) for part in examples)
            units.measure(stats, spatial, source.t_buckets)
            for name, buffer in units.state_dict(prefix="sol_prior.units.").items():
                self._ema.shadow[name].copy_(buffer)

    def train(self, epochs: int = 1) -> None:
        """Train for ``epochs`` more passes, or until ``config.total_steps``.

        After :meth:`load_checkpoint` in the middle of a pass, its rest counts as one.

        Raises:
            TrainingError: :meth:`setup` was not called, or gradients stayed non-finite.
        """
        loop = self.loop
        device = next(self.model.parameters()).device
        if device != self._device:
            raise TrainingError(
                f"the model was moved from {self._device} to {device} after the Trainer was made "
                "with it (a Sampler moves its model): make both with one device"
            )
        loop.run(self.steps(epochs))

    def save_checkpoint(self, path: str) -> None:
        """Write a checkpoint directory; see ``tinyflux.trainer.checkpoint``."""
        state = replace(self._state, seed=self.config.seed, trainer=to_dict(self.config))
        optimizer = self._engine.optimizer_state() or {}
        weights, shadow = self.model.state_dict(), self._ema.shadow
        tracks = {length: track.shadow for length, track in self._power_ema.tracks.items()}
        decay = self._ema.decay
        projectors = self._engine.projectors() or {}
        contents = CheckpointData(
            self.model, weights, shadow, decay, optimizer, state, tracks, projectors
        )
        save_checkpoint(path, contents)

    def load_checkpoint(self, path: str) -> None:
        """Continue from a checkpoint directory, of this class or of a Ray run.

        Raises:
            CheckpointError: it is missing, damaged or made for another model; nothing has changed
                then.
        """
        checkpoint = load_checkpoint(path, self.config.verify_checkpoints)
        check_same_adapter(checkpoint.state, self.config, f"checkpoint {path}")
        check_same_targets(checkpoint.state, self.config, f"checkpoint {path}")
        if self.config.adapter is not None:
            began = FirstWeights(**self._state.init_from)
            check_same_base(checkpoint.state, began, f"checkpoint {path}")
        checkpoint.check(self.model)
        self._power_ema.check(checkpoint.tracks, f"checkpoint {path}")
        # First what may still be refused.
        self._engine.load_optimizer_state(checkpoint.optimizer)
        load_projectors(self._module, checkpoint.projectors, f"checkpoint {path}")
        checkpoint.load_model(self.model)
        # Of a run with an adapter it holds no weights that stay as they are.
        shadow = {**self._ema.shadow, **checkpoint.shadow}
        self._ema.load_state_dict({"decay": self.config.ema_decay, "shadow": shadow})
        self._power_ema.load(checkpoint.tracks, f"checkpoint {path}")
        if checkpoint.state.seed != self.config.seed:
            logger.warning(
                "checkpoint %s was trained with seed %d, this run has seed %d: the order of "
                "samples will differ", path, checkpoint.state.seed, self.config.seed,
            )  # fmt: skip
        for name, value in vars(checkpoint.state).items():
            setattr(self._state, name, value)

    def steps(self, epochs: int) -> Iterator[StepData]:
        """The data of each optimizer step of ``epochs`` passes, from where the run stands."""
        if self._source is None:
            raise TrainingError(NO_DATA)
        if epochs < 1:
            return
        last = self._state.epoch + epochs
        units = self.model.sol_units if self.config.enable_sol else None
        lacks_units = units is not None and not units.measured
        for step in self._source.after(self._state):
            if lacks_units and any(batch.sol_stats is not None for batch in step.micro_batches):
                raise TrainingError(
                    "the model standardises Sol's features (sol_standardize) and does not know "
                    "their mean and spread: give Trainer.setup a MultiSourceCache, or call "
                    "model.sol_units.measure(stats, spatial, t_buckets) before"
                )
            yield step
            if step.epoch >= last:
                return


def _steps_of(
    data: DataLoader[Any] | StepSource, cache: FeatureSource | None, config: TrainerConfig
) -> StepSource:
    """The steps of what :meth:`Trainer.setup` was given."""
    if not isinstance(data, StepSource):
        if data.batch_size == 1 and any(target.shuffle for target in config.align):
            raise InputError(
                "trainer.align shuffles targets among the samples of a batch, and the DataLoader's "
                "are of 1 sample: make it with a larger batch_size"
            )
        return LoaderSteps(data, cache, config.gradient_accumulation, config.seed)
    if cache is not None:
        raise InputError(
            f"Trainer.setup got a {type(data).__name__}, which reads the teachers' features "
            "itself, and a cache beside it: leave the cache out"
        )
    return data
