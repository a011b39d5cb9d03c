"""A comparison on a real Ray: equal arms are equal, other seeds are not, a kill changes nothing.

Slow: processes that import torch and Ray train eight students, in two starts of the command.
"""

import json
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from tests.fixtures import keeper
from tests.fixtures.ray_head import ROOT, running_cluster
from tests.fixtures.s3_server import BUCKET, s3_server
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import WorkersConfig
from tinyflux.storage.remote import RemoteFolder
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics

pytestmark = pytest.mark.slow
STEPS, EVERY = 12, 2
FILE = """
output: {folder}/out
base: {folder}/run.yaml
arms: {{same: , reseeded: , split: {{workers.num_workers: 2, workers.cpus_per_worker: 0.5}}}}
seed_offset: {{reseeded: 100}}
seeds: 2
metric: val_velocity_ema
metrics: [val_velocity, loss]
concurrent: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, a world and a comparison's file; no cache yet."""
    folder = tmp_path_factory.mktemp("compare")
    write_pictures(folder / "pictures", [*CAPTIONS] * 3)
    run = RunConfig(
        run_dir=str(folder / "unused"),
        data=DataConfig(str(folder / "pictures"), height=16, width=16),
        zoo=zoo_config(make_world(folder / "world")),
        cache=CacheConfig(str(folder / "cache"), cpus_per_actor=1),
        model=student_config(),
        trainer=TrainerConfig(
            learning_rate=1e-2,
            warmup_steps=0,
            gradient_accumulation=1,
            batch_size=4,
            total_steps=STEPS,
            ema_decay=0.5,
            save_every_steps=EVERY,
            keep_last_n_steps=STEPS,
            validate_every=EVERY,
            sample_every=STEPS,
            sample_prompts=CAPTIONS[:2],
            sample_steps=1,
            log_every=1,
            val_fraction=0.2,
            trackers=[],
            dtype=torch.float32,
        ),
        workers=WorkersConfig(num_workers=1),
    )
    save_run_config(run, folder / "run.yaml")
    (folder / "mine.yaml").write_text(FILE.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def done(folder, head):
    """The comparison's directory after a kill and a second start; what the two said."""
    command = [sys.executable, "-m", "tinyflux", "compare", str(folder / "mine.yaml")]
    out, logs = folder / "out", [folder / "first.log", folder / "second.log"]
    place = {"cwd": ROOT, "env": {**head.environment, "OMP_NUM_THREADS": "1"}}
    with logs[0].open("w") as log:
        first = keeper.start(command, stdout=log, stderr=log, **place)
    try:
        # The second trial has a checkpoint: the first one is finished.
        wait_for(
            lambda: list(out.glob("runs/same/seed-0/checkpoints/step_*")) or ended(first),
            3 * PATIENCE,
        )
    finally:
        first.kill()
        first.wait()
    assert (out / "runs/base/seed-0/final/training.json").exists(), logs[0].read_text()
    assert not (out / "page.html").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("t*.json")}
    with logs[1].open("w") as log:
        status = subprocess.run(
            command, stdout=log, stderr=log, timeout=3 * PATIENCE, check=False, **place
        ).returncode
    assert status == 0, logs[1].read_text()
    return out, before, [log.read_text() for log in logs]


def ended(process):
    return process.poll() is not None


@pytest.fixture
def record(done):
    return json.loads((done[0] / "comparison.json").read_text())


def figures(out, arm, seed):
    """All losses of a trial by step and name."""
    return {
        (one["step"], name): value
        for one in read_metrics(out / "runs" / arm / f"seed-{seed}" / "metrics.jsonl")
        for name, value in one.items()
        if name.startswith(("loss", "val_"))
    }


def test_what_was_finished_is_not_run_again_and_what_was_stopped_goes_on(done):
    out, before, (first, second) = done
    assert "8 trials" in first
    assert before
    assert {path.stat().st_mtime_ns for path in before} == set(before.values())
    assert "trials are finished" in second
    assert str(out / "page.html") in second


def test_equal_arms_differ_by_exactly_nothing_and_another_seed_does_not(done, record):
    out = done[0]
    for seed in (0, 1):
        base = figures(out, "base", seed)
        assert {step for step, _ in base} == {*range(STEPS + 1)}
        assert figures(out, "same", seed) == base
        other = figures(out, "reseeded", seed)
        assert base.keys() == other.keys()
        assert other[(STEPS, "val_velocity_ema")] != base[(STEPS, "val_velocity_ema")]
    found = {(one["arm"], one["metric"]): one for one in record["comparisons"]}
    for metric in ("val_velocity_ema", "val_velocity", "loss"):
        same, reseeded = found["same", metric], found["reseeded", metric]
        assert all(at["by_seed"] == [0.0, 0.0] for at in same["at_steps"])
        assert all(at["half_width"] == 0.0 for at in same["at_steps"])
        assert "exactly the same value" in same["verdict"]
        assert all(0.0 not in at["by_seed"] for at in reseeded["at_steps"][1:])
        assert (same["paired"], reseeded["paired"]) == (True, False)


def test_an_arm_of_two_workers_has_the_losses_of_one(done):
    one, two = (figures(done[0], arm, 0) for arm in ("base", "split"))
    assert two == pytest.approx(one, rel=1e-4)
    assert list((done[0] / "runs/split/seed-0/ray").iterdir())  # by a job of Ray Train's


def test_a_trial_is_a_run_of_its_own(done, record):
    trial = record["trials"][0]
    assert trial["run_dir"] == "runs/base/seed-0"
    assert trial["threads"] == 1
    assert "cores" in trial["machine"]
    assert 0 < trial["seconds"] < PATIENCE
    assert {path.name for path in (done[0] / trial["run_dir"]).iterdir()} >= {
        "config.yaml", "metrics.jsonl", "final", "samples", "checkpoints",
    }  # fmt: skip


def test_other_settings_are_not_counted_as_the_same_trial(done, folder, head):
    command = [sys.executable, "-m", "tinyflux", "compare", str(folder / "mine.yaml")]
    refused = subprocess.run(
        [*command, "--trainer.learning_rate", "0.5"],
        cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=PATIENCE,
        check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "trainer.learning_rate = 0.01, now 0.5" in refused.stderr


def test_a_comparison_may_lie_in_a_bucket(folder, tmp_path, monkeypatch):
    """Its trials, record and page; only the cache is on the disk."""
    with s3_server(tmp_path / "s3.log") as s3, ExitStack() as stack:
        for name, value in s3.environment(tmp_path / "local").items():
            monkeypatch.setenv(name, value)
        extra = {**s3.environment(tmp_path / "local"), "PYTHONPATH": str(ROOT)}
        ray = stack.enter_context(running_cluster(tmp_path / "ray.log", extra))
        file, place = tmp_path / "bucket.yaml", f"s3://{BUCKET}/mine"
        file.write_text(f"base: {folder}/run.yaml\nseeds: 1\narms: {{same: }}\noutput: {place}\n")
        command = [sys.executable, "-m", "tinyflux", "compare", str(file)]

        def run(*options):
            return subprocess.run(
                [*command, *options], cwd=ROOT, env={**ray.environment, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, timeout=2 * PATIENCE, check=False,
            )  # fmt: skip

        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"{place}/page.html"
        bucket = RemoteFolder(place)
        record = json.loads(bucket.read("comparison.json"))
        assert "exactly the same value" in record["comparisons"][0]["verdict"]
        assert bucket.read("page.html").count(b"data:image/png") == 2
        again = run()
        assert "2 of 2 trials are finished" in again.stdout + again.stderr
        refused = run("--trainer.learning_rate", "0.5")
        assert refused.returncode == 2
        assert "trainer.learning_rate = 0.01, now 0.5" in refused.stderr


def test_the_page_shows_everything_in_a_real_browser(done, browser):
    page = browser.new_page()
    complaints, elsewhere = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    address = (done[0] / "page.html").as_uri()
    page.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((address, "data:")) else elsewhere.append(sent.url)
        ),
    )
    page.goto(address)
    assert page.inner_text("h1") == "Comparison mine"
    assert "same and base have exactly the same value" in page.inner_text(".verdict >> nth=0")
    assert page.locator("svg").count() == 6  # curves and differences of three metrics
    pictures = page.locator("figure img")
    assert pictures.count() == 8
    widths = pictures.evaluate_all("found => found.map(one => one.naturalWidth)")
    assert all(width > 0 for width in widths)
    # Nothing is wider than the page.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()
    assert complaints == []
    assert elsewhere == []
