"""Where a run's numbers can be watched, with the real packages.

Slow: wandb starts a service.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.fixtures.trainers import make_trainer, weights
from tinyflux.errors import ConfigError, MissingDependencyError
from tinyflux.trainer import trackers
from tinyflux.trainer.config_checks import TRACKERS
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.trainer import TrainerConfig

NUMBERS = {"train/loss", "train/loss_lune", "train/lr", "train/grad_norm", "train/samples_per_s"}


def test_every_name_that_the_settings_take_has_a_package():
    assert set(trackers.PACKAGES) == set(TRACKERS)


def test_an_unknown_tracker_and_a_missing_package_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'wandbb', which is unknown \(did you mean 'wandb'\?\)"):
        TrainerConfig(trackers=["wandbb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trainer = make_trainer(tmp_path, trackers=["wandb"])
    with pytest.raises(MissingDependencyError, match=r"pip install 'tinyflux\[wandb\]'"):
        trainer.train()
    assert trainer.current_step == 0


def test_tensorboard_has_the_numbers_of_the_record(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, log_every=1).train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) >= NUMBERS
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    record = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "logs" / "metrics.jsonl")}
    assert told == pytest.approx(record)


@pytest.mark.filterwarnings("default")
def test_mlflow_gets_the_numbers_and_a_resumed_run_goes_on_in_the_same_place(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = {"trackers": ["mlflow"], "log_every": 1, "tracker_project": "toy"}
    trainer = make_trainer(tmp_path, total_steps=2, **settings)
    trainer.train(9)
    trainer.save_checkpoint(str(tmp_path / "here"))
    resumed = make_trainer(tmp_path, total_steps=4, **settings)
    resumed.load_checkpoint(str(tmp_path / "here"))
    resumed.train(9)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'logs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy")
    (run,) = client.search_runs([experiment.experiment_id])
    assert set(run.data.metrics) >= NUMBERS
    assert run.data.params["learning_rate"] == str(trainer.config.learning_rate)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_gets_the_numbers_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    make_trainer(tmp_path, trackers=["wandb"], log_every=1).train()
    run_id = (tmp_path / "logs" / "wandb.id").read_text()
    (file,) = (tmp_path / "logs").glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    assert b"train/loss_lune" in file.read_bytes()


def test_a_tracker_that_fails_is_logged_once_and_training_is_the_same(
    tmp_path, monkeypatch, caplog
):
    class Broken:
        def __init__(self, *_):
            self.calls = 0

        def write(self, step, values):
            raise ConnectionError("no route to host")

    plain = make_trainer(tmp_path / "a", log_every=1)
    plain.train(2)
    monkeypatch.setattr(trackers, "TensorBoard", Broken)
    watched = make_trainer(tmp_path / "b", log_every=1)
    watched.train(2)
    assert torch.equal(weights(plain), weights(watched))
    assert caplog.text.count("no route to host") == 1


def test_no_token_of_the_environment_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    told = []
    monkeypatch.setattr(
        "tinyflux.trainer.recorder.open_trackers", lambda *arguments: told.append(arguments) or []
    )
    make_trainer(tmp_path).train()
    assert told
    assert "_secret" not in json.dumps(told, default=str)
    for path in Path(tmp_path).rglob("*.json*"):
        assert "_secret" not in path.read_text()
