"""Where a run's numbers go: a JSON Lines file and TensorBoard."""

import json
import logging
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image

from tinyflux.util.files import atomic_write

logger = logging.getLogger(__name__)


class MetricLog:
    """Appends records to ``path`` and scalars to a TensorBoard directory.

    Args:
        path: a JSON Lines file; records after ``step`` are dropped, as those of a run that was
            killed after its last checkpoint.
        step: the step that the run starts from.
    """

    def __init__(self, path: Path, tensorboard_dir: Path, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step else []
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._known = {(record["step"], name) for record in kept for name in record}
        self._file: TextIO = path.open("a", buffering=1)
        self._board = _board(tensorboard_dir, step)

    def has(self, step: int, name: str) -> bool:
        """Whether an earlier part of the run recorded ``name`` at ``step``."""
        return (step, name) in self._known

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record, in which null is a number that is not finite; also for TensorBoard."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if value is None:
                    continue
                self._board.add_scalar(_tag(name), value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """An RGB image, for TensorBoard."""
        if self._board is None:
            return
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self._board.add_image(
            name, pixels.view(image.height, image.width, 3), step, dataformats="HWC"
        )

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _board(directory: Path, step: int) -> Any:
    """A TensorBoard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("no TensorBoard logs: the package tensorboard is not installed")
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before a slash."""
    return f"validation/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"
