"""One run file from pictures to a report, and again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ray_head import ENVIRONMENT, ROOT, wait_for
from tests.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.extract import CacheConfig
from tinyflux.cache.sources import DataConfig
from tinyflux.cli import run_job
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.train import WorkersConfig
from tinyflux.review.evaluate import nearest_share
from tinyflux.serving.batch import SampleConfig
from tinyflux.trainer.checkpoint import latest_checkpoint
from tinyflux.trainer.config import TrainerConfig


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


@pytest.mark.slow
def test_a_run_that_was_killed_continues_and_a_finished_one_does_nothing(tmp_path):
    write_pictures(tmp_path / "pictures", [*CAPTIONS, *CAPTIONS])
    run = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(folder=str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(make_world(tmp_path / "world")),
        cache=CacheConfig(path=str(tmp_path / "cache"), rows_per_shard=4, cpus_per_actor=0.5),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, total_steps=300, save_every_steps=5,
            log_every=5, val_fraction=0.2, sample_every=None,
        ),
        workers=WorkersConfig(cpus_per_worker=0.5),
        sample=SampleConfig(num_steps=2),
    )  # fmt: skip
    save_run_config(run, tmp_path / "run.yaml")
    root = Path(run.run_dir)

    def start():
        return subprocess.Popen(
            [sys.executable, "-m", "tinyflux", "run", "run.yaml"],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    first = start()
    try:
        wait_for(lambda: latest_checkpoint(root / "checkpoints") or first.poll() is not None, 240)
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        said = first.communicate()[0]
    assert "[2/4] train" in said
    assert not (root / "final").exists()

    second = start()
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    assert (
        "[1/4] cache: encode pictures, captions and teacher features with Ray Data - done" in said
    )
    assert "continuing from" in said
    evaluation = json.loads((root / "evaluation.json").read_text())
    assert evaluation["held_out"]["trained"].keys() >= {"val_velocity"}
    assert evaluation["nearest"]["count"] == len(evaluation["nearest"]["pictures"])
    page = (root / "report.html").read_text()
    assert "held-out velocity loss" in page
    assert "Traceback" not in said

    third = start()
    said = third.communicate(timeout=60)[0]
    assert third.returncode == 0
    assert said.count("done before") == 4
