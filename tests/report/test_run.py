"""One run file from pictures to a report, and again."""

import torch

from tinyflux.cli.main import run_job
from tinyflux.config import RunConfig, save_run_config
from tinyflux.report.evaluate import nearest_share


def test_nearest_counts_pictures_that_are_nearest_to_their_own():
    wanted = torch.eye(6).reshape(6, 1, 2, 3)
    assert nearest_share(wanted, wanted) == {"top1": 1.0, "top5": 1.0}
    turned = wanted.roll(1, 0)
    assert nearest_share(turned, wanted)["top1"] == 0.0


def test_what_is_missing_is_said(tmp_path, capsys):
    assert run_job("run", []) == 2
    assert "say which run" in capsys.readouterr().err
    save_run_config(RunConfig(run_dir=str(tmp_path)), tmp_path / "run.yaml")
    assert run_job("report", ["--config", str(tmp_path / "run.yaml")]) == 2
    assert "there is no evaluation.json" in capsys.readouterr().err
    assert run_job("run", [str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
