"""Where a run's numbers can be watched: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tinyflux.errors import MissingDependencyError
from tinyflux.trainer.direction import HELD_OUT, MEASURED
from tinyflux.util.files import atomic_write

logger = logging.getLogger(__name__)

# By name in ``trainer.trackers``: the package, and the extra that has it.
PACKAGES = {
    "tensorboard": ("tensorboard", "cluster"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


class Tracker(Protocol):
    """Something that is told a run's numbers."""

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Finite numbers by name; validation's come later than its step's others."""

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """An RGB image."""

    def close(self) -> None:
        """Finish writing."""


def check_trackers(names: list[str]) -> None:
    """Refuse trackers whose package is not here, before a run begins."""
    for name in names:
        package, extra = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"trainer.trackers has '{name}', but the package {package} is not installed: "
                f"pip install 'tinyflux[{extra}]', or leave it out"
            )


def open_trackers(
    names: list[str],
    run_dir: Path,
    board: Path,
    project: str,
    settings: Mapping[str, Any],
    step: int,
) -> list[Tracker]:
    """The trackers of these names, each of which cannot harm the run.

    Args:
        run_dir: names the run, and keeps what a resumed run needs to go on in the same place.
        board: TensorBoard's directory.
        settings: the resolved config, as plain data.
        step: optimizer steps done; what was told of later ones is void.
    """
    check_trackers(names)
    run_dir.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(board, step),
        "wandb": lambda: WeightsAndBiases(run_dir, project, settings),
        "mlflow": lambda: MLflow(run_dir, project, settings),
    }
    return [SafeTracker(name, makers[name]) for name in names]


class SafeTracker:
    """A tracker whose first failure is logged and ends it: training is worth more than its plot."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self._name = name
        self._inner: Tracker | None = None
        with self._forgiven():
            self._inner = make()

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        with self._forgiven():
            if self._inner is not None:
                self._inner.write(step, values)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        with self._forgiven():
            if self._inner is not None:
                self._inner.picture(step, name, image)

    def close(self) -> None:
        with self._forgiven():
            if self._inner is not None:
                self._inner.close()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._inner = None
            logger.warning("%s gets no more of this run's numbers: %s", self._name, error)


def grouped(name: str) -> str:
    """A name by its group: ``validation/lune``, ``evaluation/kid``, ``train/lr``."""
    for prefix, group in ((HELD_OUT, "validation"), (MEASURED, "evaluation")):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return f"train/{name}"


class TensorBoard:
    """Event files; those of steps after ``step`` are void."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._board.add_scalar(grouped(name), value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run on Weights & Biases, or with ``WANDB_MODE=offline`` in the run's directory.

    The key is where ``wandb login`` or ``WANDB_API_KEY`` put it. Steps are a metric of their own,
    because validation's numbers come late.
    """

    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]):
        import wandb

        name = run_dir.name
        self._run = wandb.init(
            project=project,
            name=name,
            id=_kept(run_dir / "wandb.id", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=str(run_dir),
            config=dict(settings),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log({"step": step, **{grouped(name): v for name, v in values.items()}})

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({"step": step, name: self._image(image)})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run on the MLflow server of ``MLFLOW_TRACKING_URI``, or in ``<run_dir>/mlflow.db``."""

    def __init__(self, run_dir: Path, project: str, settings: Mapping[str, Any]):
        import mlflow

        local = not mlflow.is_tracking_uri_set()
        where = run_dir.absolute()
        self._client = mlflow.MlflowClient(f"sqlite:///{where / 'mlflow.db'}" if local else None)
        known = self._client.get_experiment_by_name(project)
        experiment = (
            known.experiment_id
            if known
            else self._client.create_experiment(
                project, artifact_location=(where / "mlflow").as_uri() if local else None
            )
        )

        def start() -> str:
            run = self._client.create_run(experiment, run_name=run_dir.name)
            for key, value in _flat(settings):
                self._client.log_param(run.info.run_id, key, str(value)[:500])
            return str(run.info.run_id)

        self._id = _kept(run_dir / "mlflow.id", start)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, grouped(name), value, step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._client.log_image(self._id, image, artifact_file=f"{name}/{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _kept(path: Path, make: Callable[[], str]) -> str:
    """What an earlier part of the run left in ``path``, or something new that is left there."""
    if not path.exists():
        atomic_write(path, make().encode())
    return path.read_text()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values."""
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
