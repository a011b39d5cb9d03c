"""Training in one process, from any DataLoader."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset

from tinyflux.data.batches import HeldOut, StepData, TrainBatch
from tinyflux.errors import InputError, TrainingError
from tinyflux.inference.sampler import Sampler
from tinyflux.trainer.checkpoint import (
    CheckpointData,
    TrainerState,
    load_checkpoint,
    save_checkpoint,
)
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.evaluation import Evaluator, InlineEvaluator
from tinyflux.trainer.loop import TrainLoop
from tinyflux.trainer.prefetch import prefetch
from tinyflux.trainer.recorder import Recorder, RunPaths
from tinyflux.trainer.step import SOL_SAMPLES, as_module
from tinyflux.util.buckets import default_buckets
from tinyflux.util.config import to_dict
from tinyflux.util.seeding import generator

__all__ = ["FeatureSource", "Trainer", "TrainerConfig"]

logger = logging.getLogger(__name__)


class FeatureSource(Protocol):
    """What the trainer needs of a MultiSourceCache, whose ``dataset_ids`` and ``null_text`` are
    used where there are any.
    """

    def gather(self, local_indices: Tensor, dataset_ids: Tensor) -> dict[str, Tensor | None]:
        """Teacher features by bucket of samples ``[B]`` of datasets ``[B]``.

        Keys as in :class:`TrainBatch`: ``lune``, ``sol_stats``, ``sol_spatial`` and their masks.
        """


class Trainer:
    """Trains a student with plain torch.

    Each batch of the DataLoader is a micro-batch; ``gradient_accumulation`` of them make an
    optimizer step, and fewer at the end of a pass. The model stays on its device and is kept in
    fp32.
    """

    def __init__(self, model: nn.Module, config: TrainerConfig):
        self.model, self.config = as_module(model), config
        self._device = next(self.model.parameters()).device
        self._engine = TorchEngine(self.model, config)
        self._ema = EMA(self.model, config.ema_decay)
        self._state = TrainerState(seed=config.seed)
        self._dataloader: DataLoader[Any] | None = None
        self._cache: FeatureSource | None = None
        self._loop: TrainLoop | None = None
        self._lacks_units = False

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
            raise TrainingError("call Trainer.setup with a DataLoader before Trainer.train")
        return self._loop

    def setup(
        self,
        dataloader: DataLoader[Any],
        cache: FeatureSource | None = None,
        sampler: Sampler | None = None,
        null_text: tuple[Tensor, Tensor] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        """Say what to train on.

        Args:
            dataloader: gives dictionaries with ``latents`` ``[B, C, H, W]``, ``t5_embeds``
                ``[B, L, D]``, ``clip_pooled`` ``[B, P]`` and, optional, ``mask`` ``[B, H, W]``,
                ``index`` and ``dataset_id`` ``[B]`` (needed with ``cache``, the latter where it
                holds more than one dataset).
            cache: teacher features by (index, dataset_id).
            sampler: draws ``config.sample_prompts``.
            null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, which
                dropped captions are trained on and inference is given; left out, the cache's, the
                dataset's (an EncodingCache, or Subset and ConcatDataset of some) or the sampler's
                zoo's.
            held_out: samples to validate on.

        A model with ``sol_standardize`` that has not been trained yet takes the mean and spread of
        Sol's features from ``cache``, if it has a MultiSourceCache's ``sol_examples``; else
        ``model.sol_units.measure`` has to be called before.

        Raises:
            InputError: captions are dropped and nobody knows the empty one's embeddings.
        """
        if sampler is not None and sampler.device.type != self._device.type:
            raise InputError(
                f"the sampler draws on {sampler.device} and the trainer trains on {self._device}: "
                "make the Sampler with the device that the model is on"
            )
        if null_text is None and self.config.text_dropout > 0:
            null_text = _find_null_text(dataloader, cache, sampler)
        self._dataloader, self._cache = dataloader, cache
        self._measure_sol(cache)
        t_buckets = getattr(cache, "t_buckets", None)
        buckets = default_buckets() if t_buckets is None else t_buckets
        config = self.config
        paths = RunPaths(
            checkpoints=Path(config.checkpoint_dir),
            samples=Path(config.sample_dir),
            tensorboard=Path(config.tensorboard_dir),
            metrics=Path(config.tensorboard_dir) / "metrics.jsonl",
        )
        evaluator = Evaluator(self.model, self._ema, config, buckets, held_out, sampler)
        self._loop = TrainLoop(
            self._engine,
            config,
            self._state,
            self._ema,
            null_text,
            buckets,
            Recorder(config, paths, InlineEvaluator(evaluator)),
        )

    def _measure_sol(self, cache: FeatureSource | None) -> None:
        """Measure the units of Sol's features, once in a model's life."""
        units = self.model.sol_units if self.config.enable_sol else None
        if units is None or units.measured:
            return
        examples = getattr(cache, "sol_examples", lambda count: None)(SOL_SAMPLES)
        if examples is not None:
            device = units.map_std.device
            stats, spatial = (part.to(device) for part in examples)
            units.measure(stats, spatial, cache.t_buckets)  # type: ignore[union-attr]
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
        units = self.model.sol_units if self.config.enable_sol else None
        self._lacks_units = units is not None and not units.measured
        data = prefetch(self.steps(epochs))
        try:
            loop.run(data)
        finally:
            data.close()  # type: ignore[attr-defined]

    def save_checkpoint(self, path: str) -> None:
        """Write a checkpoint directory; see ``tinyflux.trainer.checkpoint``."""
        state = replace(self._state, seed=self.config.seed, trainer=to_dict(self.config))
        optimizer = self._engine.optimizer_state() or {}
        weights, shadow = self.model.state_dict(), self._ema.shadow
        save_checkpoint(
            path, CheckpointData(self.model, weights, shadow, self._ema.decay, optimizer, state)
        )

    def load_checkpoint(self, path: str) -> None:
        """Continue from a checkpoint directory, of this class or of a Ray run.

        Raises:
            CheckpointError: it is missing, damaged or made for another model; nothing has changed
                then.
        """
        checkpoint = load_checkpoint(path, self.config.verify_checkpoints)
        checkpoint.check(self.model)
        # First what may still be refused.
        self._engine.load_optimizer_state(checkpoint.optimizer)
        checkpoint.load_model(self.model)
        self._ema.load_state_dict({"decay": self.config.ema_decay, "shadow": checkpoint.shadow})
        if checkpoint.state.seed != self.config.seed:
            logger.warning(
                "checkpoint %s was trained with seed %d, this run has seed %d: the order of "
                "samples will differ", path, checkpoint.state.seed, self.config.seed,
            )  # fmt: skip
        for name, value in vars(checkpoint.state).items():
            setattr(self._state, name, value)

    def steps(self, epochs: int) -> Iterator[StepData]:
        """The data of each optimizer step of ``epochs`` passes, from where the run stands."""
        seen, skip = self._state.samples_seen, self._state.epoch_batches
        first = self._state.epoch
        for epoch in range(first, first + epochs):
            group: list[TrainBatch] = []
            batches = _with_last(self._epoch(epoch))
            for count, (raw, last) in enumerate(batches, start=1):
                if count <= skip:
                    continue
                size = len(raw["latents"]) if "latents" in raw else 0
                group.append(self._batch(raw, torch.arange(seen, seen + size)))
                seen += size
                if last or len(group) == self.config.gradient_accumulation:
                    total = sum(map(len, group))
                    yield StepData(group, seen, epoch + last, 0 if last else count, total)
                    group = []
            skip = 0

    def _epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """One pass over the DataLoader, its shuffle depending on (seed, epoch) alone."""
        loader = self._dataloader
        if loader is None:
            raise TrainingError("call Trainer.setup with a DataLoader before Trainer.train")
        if isinstance(loader.sampler, RandomSampler):
            loader.sampler.generator = generator(self.config.seed, "order", epoch)
        elif hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        return iter(loader)

    def _batch(self, raw: dict[str, Any], positions: Tensor) -> TrainBatch:
        """What the DataLoader gave, with its teacher features."""
        if self._cache is not None:
            if "index" not in raw:
                raise InputError(
                    "a batch has no 'index' to find its teacher features by: the dataset's items "
                    "must hold one, like EncodingCache's"
                )
            index = torch.as_tensor(raw["index"])
            raw = {**raw, **self._cache.gather(index, self._dataset_id(raw, index))}
        batch = TrainBatch.from_dict(raw, positions)
        if self._lacks_units and batch.sol_stats is not None:
            raise TrainingError(
                "the model standardises Sol's features (sol_standardize) and does not know their "
                "mean and spread: give Trainer.setup a MultiSourceCache, or call "
                "model.sol_units.measure(stats, spatial, t_buckets) before"
            )
        return batch

    def _dataset_id(self, raw: dict[str, Any], index: Tensor) -> Tensor:
        """``[B]``: which of the cache's datasets the samples ``index`` ``[B]`` are of."""
        if "dataset_id" in raw:
            return torch.as_tensor(raw["dataset_id"])
        known: Sequence[int] = getattr(self._cache, "dataset_ids", (0,))
        if len(known) > 1:
            raise InputError(
                f"a batch has no 'dataset_id' and the cache holds {len(known)} datasets: the "
                "dataset's items must say which one they are of, as MultiSourceCache.add numbered "
                "it"
            )
        return torch.full_like(index, known[0] if known else 0)


def _find_null_text(
    dataloader: DataLoader[Any], cache: FeatureSource | None, sampler: Sampler | None
) -> tuple[Tensor, Tensor]:
    """T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, from whoever has them."""
    found: tuple[Tensor, Tensor] | None = getattr(cache, "null_text", None)
    if found is None:
        found = _null_text_of(dataloader.dataset)
    if found is None and sampler is not None:
        t5, pooled = sampler.zoo.encode_prompts_batched([""], allow_empty=True)
        found = (t5[0], pooled[0])
    if found is None:
        raise InputError(
            "neither the dataset nor the cache knows the empty caption's embeddings, which dropped "
            "captions are trained on and inference is given: pass Trainer.setup a sampler or "
            "null_text=(t5, pooled) of '', or set trainer.text_dropout to 0"
        )
    return found


def _null_text_of(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """The empty caption's embeddings that a dataset, or every part of it that has some, holds."""
    if isinstance(dataset, Subset):
        return _null_text_of(dataset.dataset)
    if not isinstance(dataset, ConcatDataset):
        return getattr(dataset, "null_text", None)
    parts = [text for text in map(_null_text_of, dataset.datasets) if text is not None]
    for text in parts[1:]:
        if not all(map(torch.equal, text, parts[0])):
            raise InputError(
                "the datasets hold different embeddings of the empty caption, so they were not "
                "encoded alike: build them with one zoo, or pass Trainer.setup null_text"
            )
    return parts[0] if parts else None


def _with_last(items: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each item and whether it is the last."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following is None
        item = following
