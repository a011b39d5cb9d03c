"""Steps' data, read, drawn and copied to the device while the steps before are computed."""

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinyflux.data.batches import StepData
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.draws import Conditions
from tinyflux.trainer.prefetch import prefetch


@dataclass
class ReadyStep:
    """What one optimizer step computes with, on its device.

    Attributes:
        data: its micro-batches, and the place in the data after them.
        conditions: of each micro-batch.
        copied: when the copies are there; None where nothing was copied.
    """

    data: StepData
    conditions: list[Conditions]
    copied: torch.cuda.Event | None = None


class Feed:
    """Makes a run's steps ready ahead of time, in a thread.

    On a GPU what a step needs is copied from pinned memory on a stream of its own, so that neither
    the thread nor the steps under way wait for it. Up to four steps' data are on the device then:
    the one under way, two that are ready and one that is copied.
    """

    def __init__(self, device: torch.device, config: TrainerConfig):
        self._device, self._config = device, config
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def steps(
        self, data: Iterable[StepData], ahead: bool = True
    ) -> Generator[ReadyStep, None, None]:
        """The steps of ``data``, each ready for :func:`torch.cuda.current_stream`.

        Closing it ends the thread; without ``ahead`` there is none.
        """
        if not ahead:
            yield from map(self.ready, data)
            return
        with closing(prefetch(map(self._begin, data))) as steps:
            for step in steps:
                yield self._await(step)

    def ready(self, data: StepData) -> ReadyStep:
        """One step made ready here and now."""
        return self._await(self._begin(data))

    def _begin(self, data: StepData) -> ReadyStep:
        """Draw, and begin the copies."""
        with torch.cuda.stream(self._stream):  # None changes no stream
            conditions = [
                Conditions.of(batch, self._config, self._device) for batch in data.micro_batches
            ]
            batches = [batch.map(self._copy) for batch in data.micro_batches]
            moved = [one.map(self._copy) for one in conditions]
            copied = None if self._stream is None else self._stream.record_event()
        return ReadyStep(replace(data, micro_batches=batches), moved, copied)

    def _copy(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; on a GPU it is there once the stream has come so far."""
        if self._stream is None or tensor.device.type == self._device.type:
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _await(self, step: ReadyStep) -> ReadyStep:
        """Let the current stream, and not this thread, wait for a step's copies."""
        if step.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(step.copied)

            def keep(tensor: Tensor) -> Tensor:
                # Made on one stream and used on another: its memory is free after the latter's use.
                tensor.record_stream(stream)
                return tensor

            for batch, conditions in zip(step.data.micro_batches, step.conditions, strict=True):
                batch.map(keep)
                conditions.map(keep)
        return step
