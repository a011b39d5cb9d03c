"""The run files that the project ships: each is read, and planned as it stands.

Slow: each plan runs a student of its real size on tensors without values.
"""

from pathlib import Path

import pytest

from tinyflux.config import load_run_config, parse_run_config, stage_names
from tinyflux.plan.stages import plan_stages

pytestmark = pytest.mark.slow
FILES = sorted((Path(__file__).parents[1] / "configs").glob("*nod*.yaml"))
FILES += sorted((Path(__file__).parents[1] / "configs").glob("*gpu*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_file_is_read_and_fits_its_cluster(file):
    whole = parse_run_config(["--config", str(file)], whole=True)
    assert whole.preset in ("s", "b", "l")
    runs = {name: load_run_config(file, ["--stage", name]) for name in stage_names(whole)}
    assert len(runs) > 1
    staged = plan_stages(runs)
    for name, plan in staged.stages.items():
        training = plan.training
        assert sum(training.memory[training.stage].values()) <= training.limit
        # What a crash costs: at most a quarter of an hour.
        assert training.step_seconds * runs[name].trainer.save_every_steps < 900
    assert staged.hours == pytest.approx(sum(plan.hours for plan in staged.stages.values()))
