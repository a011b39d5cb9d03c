"""Optimizer steps out of a DataLoader's batches."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset

from tinyflux.data.batches import Place, StepData, TrainBatch
from tinyflux.errors import InputError
from tinyflux.model.text import NullText, same_null_text
from tinyflux.util.seeding import generator


class FeatureSource(Protocol):
    """What the trainer needs of a MultiSourceCache.

    Its ``dataset_ids`` and ``null_text`` are used where there are any.
    """

    def gather(self, local_indices: Tensor, dataset_ids: Tensor) -> dict[str, Tensor | None]:
        """Teacher features by bucket of samples ``[B]`` of datasets ``[B]``.

        Keys as in :class:`TrainBatch`: ``lune``, ``sol_stats``, ``sol_spatial`` and their masks.
        """


class LoaderSteps:
    """Makes steps of a DataLoader's batches, pass after pass.

    Each batch is a micro-batch; ``accumulation`` of them make a step, and fewer at the end of a
    pass.
    """

    def __init__(
        self, dataloader: DataLoader[Any], cache: FeatureSource | None, accumulation: int, seed: int
    ):
        self._dataloader, self._cache = dataloader, cache
        self._accumulation, self._seed = accumulation, seed

    @property
    def null_text(self) -> NullText | None:
        """T5 ``[L, D]`` and pooled ``[P]`` embeddings of ``""``, where cache or dataset has them.

        Raises:
            InputError: the parts of the dataset have different ones.
        """
        known: NullText | None = getattr(self._cache, "null_text", None)
        return _null_text_of(self._dataloader.dataset) if known is None else known

    @property
    def t_buckets(self) -> Tensor | None:
        """``[K]`` times of the cache's teacher features, if it says."""
        return getattr(self._cache, "t_buckets", None)

    def sol_examples(self, count: int) -> tuple[Tensor, Tensor] | None:
        """See :meth:`StepSource.sol_examples`; those of a MultiSourceCache."""
        examples = getattr(self._cache, "sol_examples", None)
        return None if examples is None else examples(count)

    def after(self, place: Place) -> Iterator[StepData]:
        """See :meth:`StepSource.after`; ends only if the DataLoader is empty."""
        seen, epoch, skip = place.samples_seen, place.epoch, place.epoch_batches
        while True:
            count = 0
            group: list[TrainBatch] = []
            for count, (raw, last) in enumerate(_with_last(self._epoch(epoch)), start=1):
                if count <= skip:
                    continue
                size = len(raw["latents"]) if "latents" in raw else 0
                group.append(self._batch(raw, torch.arange(seen, seen + size)))
                seen += size
                if last or len(group) == self._accumulation:
                    total = sum(map(len, group))
                    yield StepData(group, seen, epoch + last, 0 if last else count, total)
                    group = []
            if not count:
                return
            skip, epoch = 0, epoch + 1

    def _epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """One pass over the DataLoader, its shuffle depending on (seed, epoch) alone."""
        sampler = self._dataloader.sampler
        if isinstance(sampler, RandomSampler):
            sampler.generator = generator(self._seed, "order", epoch)
        elif hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        return iter(self._dataloader)

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
        return TrainBatch.from_dict(raw, positions)

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


def _null_text_of(dataset: Any) -> NullText | None:
    """The empty caption's embeddings that a dataset, or every part of it that has some, holds."""
    if isinstance(dataset, Subset):
        return _null_text_of(dataset.dataset)
    if not isinstance(dataset, ConcatDataset):
        return getattr(dataset, "null_text", None)
    parts = [text for text in map(_null_text_of, dataset.datasets) if text is not None]
    for text in parts[1:]:
        if not same_null_text(text, parts[0]):
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
