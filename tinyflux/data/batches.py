"""What a training step and validation read: samples in tensors, wherever they come from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tinyflux.data.passes import NO_PASSES, Passes
from tinyflux.errors import InputError


@dataclass
class TrainBatch:
    """Samples of one micro-batch. K is the number of teacher buckets.

    Attributes:
        latents: ``[B, C, H, W]``.
        t5_embeds: ``[B, L, D]``.
        clip_pooled: ``[B, P]``.
        positions: ``[B]`` int64, each sample's place in the run's stream of samples.
        lune: ``[B, K, D]`` teacher features by bucket, or None.
        sol_stats: ``[B, K, 4]``, or None; ``sol_spatial``: ``[B, K, s, s]``, or None.
        lune_mask, sol_mask: ``[B]`` bool, which samples have the teacher's features.
        mask: ``[B, H, W]`` foreground, or None.
    """

    latents: Tensor
    t5_embeds: Tensor
    clip_pooled: Tensor
    positions: Tensor
    lune: Tensor | None = None
    sol_stats: Tensor | None = None
    sol_spatial: Tensor | None = None
    lune_mask: Tensor | None = None
    sol_mask: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.latents.shape[0]
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None and tensor.shape[0] != size:
                raise InputError(
                    f"a batch's {field.name} has {tensor.shape[0]} samples, its latents {size}"
                )
        if self.lune is not None and self.lune_mask is None:
            self.lune_mask = torch.ones(size, dtype=torch.bool)
        if self.sol_stats is not None and self.sol_mask is None:
            self.sol_mask = torch.ones(size, dtype=torch.bool)

    @classmethod
    def from_dict(cls, data: Mapping[str, Tensor | None], positions: Tensor) -> "TrainBatch":
        """From what a cache reads or a DataLoader collates; other keys are ignored.

        Raises:
            InputError: latents, t5_embeds or clip_pooled are missing.
        """
        for name in ("latents", "t5_embeds", "clip_pooled"):
            if data.get(name) is None:
                raise InputError(
                    f"a batch has no '{name}' (it has {', '.join(map(str, data)) or 'nothing'}): "
                    "the dataset's items must be dictionaries like EncodingCache's"
                )
        names = {field.name for field in fields(cls)} - {"positions"}
        return cls(positions=positions, **{k: v for k, v in data.items() if k in names})  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """``(H, W)`` of the latents."""
        return self.latents.shape[2], self.latents.shape[3]

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The batch with every tensor but ``positions`` on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> "TrainBatch":
        """The batch with every tensor but ``positions`` changed so, as by a copy to a device."""
        changed: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, tensor in changed.items():
            if tensor is not None and name != "positions":
                changed[name] = change(tensor)
        return TrainBatch(**changed)

    def __getitem__(self, rows: slice) -> "TrainBatch":
        """A part of the batch."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainBatch(**{k: None if v is None else v[rows] for k, v in parts.items()})  # type: ignore[arg-type]


@dataclass
class StepData:
    """What one optimizer step trains on, and the place in the data after it.

    Attributes:
        micro_batches: this worker's share.
        samples_seen: samples of the run over all workers, these included.
        epoch: complete passes. epoch_batches: micro-batches of the pass under way.
        size: samples of the step over all workers.
        passes: which shards the passes read, where caches grow.
    """

    micro_batches: list[TrainBatch]
    samples_seen: int
    epoch: int
    epoch_batches: int
    size: int
    passes: Passes = NO_PASSES


class Place(Protocol):
    """A place in the data of a run: that after a :class:`StepData`, or of a checkpoint's state."""

    samples_seen: int
    epoch: int
    epoch_batches: int
    passes: Passes


@runtime_checkable
class StepSource(Protocol):
    """Gives a run the data of its steps."""

    @property
    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, if they are known."""
        ...

    @property
    def t_buckets(self) -> Tensor | None:
        """``[K]`` times of the teachers' features, if they are known."""
        ...

    def after(self, place: Place) -> Iterator[StepData]:
        """The steps that follow ``place``: the same ones whenever it is asked, and no end."""
        ...

    def sol_examples(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Sol's features ``[N, K, 4]`` and ``[N, K, s, s]`` of trained-on samples, if any has them.

        They are of about ``count`` samples, or of all that there are.
        """
        ...


@dataclass
class HeldOut:
    """Held-out samples: batches, and the key of each of their samples, in order.

    Attributes:
        null_text: T5 ``[L, D]`` and pooled ``[P]`` embeddings of the empty caption, if known.
    """

    batches: Sequence[TrainBatch]
    keys: Sequence[Sequence[str]]
    null_text: tuple[Tensor, Tensor] | None = None

    def without_captions(self) -> "HeldOut | None":
        """The same samples with the empty caption; None if it is not known."""
        if self.null_text is None:
            return None
        t5, pooled = self.null_text
        batches = [
            replace(
                batch,
                t5_embeds=t5.to(batch.t5_embeds).expand_as(batch.t5_embeds),
                clip_pooled=pooled.to(batch.clip_pooled).expand_as(batch.clip_pooled),
            )
            for batch in self.batches
        ]
        return replace(self, batches=batches)
