"""The run files that the project ships: each is read, and planned as it stands.

Slow: each plan runs a student of its real size on tensors without values.
"""

from pathlib import Path

import pytest

from tinyflux.config import load_run_config
from tinyflux.plan.plan import make_plan

pytestmark = pytest.mark.slow
FILES = sorted((Path(__file__).parents[1] / "configs").glob("*nod*.yaml"))
FILES += sorted((Path(__file__).parents[1] / "configs").glob("*gpu*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_file_is_read_and_fits_its_cluster(file):
    run = load_run_config(file)
    assert run.preset in ("s", "b", "l")
    plan = make_plan(run)
    training = plan.training
    assert training.stage in training.memory
    assert sum(training.memory[training.stage].values()) <= training.limit
    # What a crash costs: at most a quarter of an hour.
    assert training.step_seconds * run.trainer.save_every_steps < 900
    assert plan.hours > 1
