"""A world and students with open gates, so that prompt and seed show in a picture."""

from pathlib import Path

import torch

from tests.worlds import make_world, student_config
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep


def make_place(folder: Path) -> Path:
    """``world`` and ``model`` in ``folder``."""
    make_world(folder / "world")
    save_student(folder / "model", seed=0)
    return folder


def save_student(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = TinyFluxDeep(student_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    save_model(model, folder)
