"""The checkpoint that is best by one of the run's numbers: marked in a file, spared by pruning."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyflux.storage.folder import Folder
from tinyflux.trainer.checkpoint_search import checkpoints_by_step
from tinyflux.trainer.direction import lower_is_better
from tinyflux.util.files import atomic_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """What ``best.json`` says.

    Attributes:
        checkpoint: The name of its directory, such as ``step_00001000``.
        step: Optimizer steps done.
        metric: The number that it is best by.
        value: Its value there.
    """

    checkpoint: str
    step: int
    metric: str
    value: float


class BestCheckpoint:
    """Finds the best checkpoint as figures come in.

    A step without a checkpoint cannot be it. What the file says follows from the run's records and
    the checkpoints that are there, so a run that was killed anywhere finds the same one.

    Args:
        metric: a number of ``metrics.jsonl``; None marks and spares nothing.
        mark: the file, whole or not there.
        checkpoints: the run's, where it goes on from.
    """

    def __init__(self, metric: str | None, mark: Path, checkpoints: Folder):
        self._metric, self._mark, self._checkpoints = metric, mark, checkpoints
        self._best: Best | None = None
        self._marked: Best | None = None
        self._names: dict[int, str] = {}

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Find the best of what an earlier part of the run has left, and mark it."""
        if self._metric is not None:
            self._names = checkpoints_by_step(self._checkpoints)
            for record in records:
                self.consider(record["step"], record)
        if self._best is None:
            self._mark.unlink(missing_ok=True)
        else:
            self._write(self._best)

    def add(self, step: int, name: str) -> None:
        """Know of a checkpoint that is about to be written."""
        self._names = {step: name}

    def consider(self, step: int, values: Mapping[str, Any]) -> None:
        """Look at what was recorded of a step."""
        value = None if self._metric is None else values.get(self._metric)
        if self._metric is None or value is None or step not in self._names:
            return
        if self._best is None or self._is_better(value, self._best.value):
            self._best = Best(self._names[step], step, self._metric, value)

    def _is_better(self, value: float, than: float) -> bool:
        assert self._metric is not None
        return value < than if lower_is_better(self._metric) else value > than

    @property
    def spared(self) -> set[str]:
        """Names of checkpoints that must not be deleted: the best, and the one that is marked."""
        return {best.checkpoint for best in (self._best, self._marked) if best is not None}

    def mark(self) -> None:
        """Write the file if there is another best one; its checkpoint must be whole by now."""
        if self._best is None or self._best == self._marked:
            return
        self._write(self._best)
        logger.info(
            "%s is the best checkpoint by %s: %.5g",
            self._best.checkpoint, self._best.metric, self._best.value,
        )  # fmt: skip

    def _write(self, best: Best) -> None:
        atomic_write(self._mark, (json.dumps(asdict(best), indent=2) + "\n").encode())
        self._marked = best


def read_best(mark: Path) -> Best | None:
    """What is marked; None where nothing is."""
    try:
        return Best(**json.loads(mark.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
