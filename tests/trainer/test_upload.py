"""Uploads with the real huggingface_hub to a server that speaks the Hub's calls.

Slow: a hub that is down is asked six times.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.fixtures.hub_server import running_hub
from tests.fixtures.ray_head import ROOT
from tests.fixtures.trainers import make_trainer
from tests.fixtures.waiting import PATIENCE

TOKEN = "hf_" + "s" * 34
# In a process of its own: huggingface_hub reads its environment once.
JOB = """
import json, logging, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from tests.fixtures.trainers import make_trainer, weights
from tinyflux.trainer import upload
upload.CLOSE_SECONDS = float(sys.argv[3])
upload.Uploader.__init__.__defaults__ = (0.05,)
upload.Uploader.close.__defaults__ = (float(sys.argv[3]),)
trainer = make_trainer(Path(sys.argv[1]), **json.loads(sys.argv[2]))
begun = time.monotonic()
trainer.train(epochs=9)
print("trained", trainer.current_step, float(weights(trainer).sum()), time.monotonic() - begun)
"""
RUN = {"hf_repo_id": "me/model", "upload_every_steps": 2, "total_steps": 4, "keep_last_n_steps": 1,
       "save_every_steps": 1}  # fmt: skip


def train(tmp_path, url, seconds=60, **changes):
    done = subprocess.run(
        [sys.executable, "-c", JOB, tmp_path, json.dumps({**RUN, **changes}), str(seconds)],
        env={**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
             "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert TOKEN not in said
    holders = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert holders == []
    return said


def names(*steps):
    kinds = ("config.json", "ema.safetensors", "model.safetensors")
    return {f"step_{step:08d}/{kind}" for step in steps for kind in kinds}


def trained(said):
    line = next(line for line in said.splitlines() if line.startswith("trained"))
    return line.split()[1:3]


def test_checkpoints_reach_the_hub_whole(tmp_path):
    with running_hub(TOKEN) as (hub, url):
        train(tmp_path, url)
    # The first was pruned before the run ended.
    assert hub.files.keys() == names(2, 4)
    kept = tmp_path / "checkpoints" / "step_00000004"
    for name in ("config.json", "ema.safetensors", "model.safetensors"):
        assert hub.files[f"step_00000004/{name}"] == (kept / name).read_bytes()
    assert all(known for _, _, known in hub.calls)
    assert not (tmp_path / "checkpoints" / ".uploads").exists()


def test_a_hub_in_trouble_is_asked_again(tmp_path):
    with running_hub(TOKEN) as (hub, url):
        hub.broken = 2
        train(tmp_path, url)
    assert hub.files.keys() == names(2, 4)


@pytest.mark.slow
def test_a_hub_that_is_down_is_one_sentence_and_the_run_is_the_same(tmp_path):
    with running_hub(TOKEN) as (_, url):
        pass  # it is gone now
    said = train(tmp_path / "a", url)
    assert said.count("upload of step_00000002 to me/model failed (try 6)") == 1
    assert "Traceback" not in said
    with running_hub(TOKEN) as (_, url):
        assert trained(train(tmp_path / "b", url)) == trained(said)


def test_a_refusal_is_not_repeated(tmp_path):
    with running_hub("another") as (hub, url):
        said = train(tmp_path, url)
    assert "upload of step_00000004 to me/model failed (try 1)" in said
    assert hub.files == {}


def test_a_slow_hub_neither_stalls_the_run_nor_holds_it_for_ever(tmp_path):
    with running_hub(TOKEN) as (hub, url):
        hub.slow = 2 * PATIENCE  # longer than the process may take
        said = train(tmp_path, url, seconds=1)
        assert hub.files == {}
    assert "2 uploads to me/model were not done within 1 s" in said


def test_nothing_is_uploaded_without_a_repository(tmp_path):
    make_trainer(tmp_path, total_steps=2).train(2)
    assert not (tmp_path / "checkpoints" / ".uploads").exists()
