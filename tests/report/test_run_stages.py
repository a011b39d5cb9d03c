"""A run file with stages, from pictures to a report, killed in the middle of its second training.

Slow: `tinyflux run` is started four times, and evaluates on Ray.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from tests.fixtures import keeper
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.trainer.metrics import read_metrics
from tinyflux.util.config import to_dict
from tinyflux.util.files import file_sha256

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture
def file(tmp_path):
    """A run of two stages: 16 pixels, then 24 with larger patches and another rate."""
    write_pictures(tmp_path / "pictures", [*CAPTIONS] * 3, size=(24, 24))
    settings = {
        "run_dir": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path / "pictures"), "resize": "crop"},
        "zoo": to_dict(zoo_config(make_world(tmp_path / "world"))),
        "model": student_config().to_dict(),
        "trainer": {
            "batch_size": 4, "gradient_accumulation": 1, "total_steps": 3, "save_every_steps": 10,
            "warmup_steps": 0, "log_every": 1, "sample_every": None, "val_fraction": 0.2,
            "dtype": "float32",
        },
        "sample": {"num_steps": 1, "prompts": CAPTIONS[:1]},
        "stages": [
            {
                "name": "small", "data": {"height": 16, "width": 16},
                "cache": {"path": str(tmp_path / "cache16")},
            },
            {
                "name": "large", "data": {"height": 24, "width": 24},
                "cache": {"path": str(tmp_path / "cache24")},
                "model": {"patch_size": 2},
                "trainer": {"total_steps": STEPS, "learning_rate": 2.0e-3},
                "sample": {"size": 24},
            },
        ],
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(file, *options):
    with file.with_suffix(".log").open("ab") as log:
        return keeper.start(
            [sys.executable, "-m", "tinyflux", "run", "--local", str(file), *options],
            cwd=file.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(file, *options):
    done = start(file, *options)
    assert done.wait(2 * PATIENCE) == 0, file.with_suffix(".log").read_text()


def kill(parent):
    """At once, with whatever it has started."""
    top = psutil.Process(parent.pid)
    for process in [*top.children(recursive=True), top]:
        process.send_signal(signal.SIGKILL)
    parent.wait()


def digests(folder):
    return {path: file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_stages_go_on_where_they_were_killed_and_are_left_alone_when_they_are_done(file):
    small, large = (file.parent / "run" / "stages" / name for name in ("small", "large"))
    running = start(file)
    wait_for(
        lambda: (
            any((large / "checkpoints").glob("step_*/trainer_state.json"))
            or running.poll() is not None
        ),
        evidence=lambda: file.with_suffix(".log").read_text(),
    )
    assert running.poll() is None, file.with_suffix(".log").read_text()
    kill(running)
    assert (small / "final" / "training.json").exists()
    assert not (large / "final").exists()
    before = digests(small)

    finish(file)
    assert digests(small) == before
    steps = [record["step"] for record in read_metrics(large / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    first = json.loads((small / "final" / "training.json").read_text())
    last = json.loads((large / "final" / "training.json").read_text())
    assert first["init_from"] == {}
    assert last["init_from"] == {
        "source": str(small), "sha256": first["files"]["model.safetensors"],
    }  # fmt: skip
    assert load_file(large / "final" / "model.safetensors")["img_in.weight"].shape == (32, 16)
    assert (large / "report.html").exists()

    done = digests(file.parent / "run" / "stages")
    finish(file)
    assert digests(file.parent / "run" / "stages") == done

    # Trained further, the first stage is no longer what the second began with.
    log = file.with_suffix(".log")
    settings = yaml.safe_load(file.read_text())
    settings["stages"][0]["trainer"] = {"total_steps": 4}
    file.write_text(yaml.safe_dump(settings))
    assert start(file).wait(PATIENCE) == 2
    assert log.read_text().splitlines()[-1].startswith(f"error: the training in {large} began with")
