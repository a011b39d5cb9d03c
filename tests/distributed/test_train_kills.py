"""Training through the deaths of its processes and of a node.

Slow: after each death, processes that import torch start again; a node comes and goes.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import keeper
from tests.fixtures.caches import build_small_cache
from tests.fixtures.ray_head import running_nodes
from tests.fixtures.waiting import PATIENCE, kills, wait_for
from tests.fixtures.worlds import CAPTIONS
from tinyflux.config import RunConfig
from tinyflux.distributed.config import WorkersConfig
from tinyflux.trainer.checkpoint_search import latest_checkpoint
from tinyflux.trainer.checkpoint_state import read_state
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics
from tinyflux.util.config import to_dict

pytestmark = [pytest.mark.slow, pytest.mark.fault]
KILLS, EVERY, STEPS = kills(5), 5, 100
LONG = 800  # while the second node comes
JOB = """
import functools, json, sys
import ray.train
from tinyflux.config import RunConfig
from tinyflux.distributed.train import train
from tinyflux.util.config import from_dict
# Look for room for more workers every second, not every minute.
ray.train.ScalingConfig = functools.partial(
    ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1.0
)
train(from_dict(RunConfig, json.loads(sys.argv[1]), "test"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What to train, on a small cache of random models."""
    folder = tmp_path_factory.mktemp("kills")
    configs = build_small_cache(folder, [*CAPTIONS] * 3)
    trainer = TrainerConfig(
        learning_rate=1e-3,
        warmup_steps=2,
        lr_scheduler="constant",
        gradient_accumulation=1,
        batch_size=6,
        total_steps=STEPS,
        ema_decay=0.9,
        save_every_steps=EVERY,
        validate_every=2 * EVERY,
        sample_every=None,
        log_every=1,
        val_fraction=0.2,
        dtype=torch.float32,
    )
    workers = WorkersConfig(num_workers=2, cpus_per_worker=0.5, max_failures=-1)
    return RunConfig(
        run_dir=str(folder / "straight"), data=configs.data, zoo=configs.zoo,
        cache=configs.cache, model=configs.model,
        trainer=trainer, workers=workers,
    )  # fmt: skip


def start(run, environment):
    with Path(run.run_dir).with_suffix(".log").open("a") as log:
        return keeper.start(
            [sys.executable, "-c", JOB, json.dumps(to_dict(run))],
            env=environment, cwd=Path(__file__).parents[2], stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(run, environment):
    driver = start(run, environment)
    try:
        assert driver.wait(timeout=PATIENCE) == 0, log_of(run)
    finally:
        driver.kill()


def log_of(run):
    return Path(run.run_dir).with_suffix(".log").read_text()[-5000:]


def final(run):
    return load_file(Path(run.run_dir) / "final" / "model.safetensors")


def saved(run):
    path = latest_checkpoint(Path(run.run_dir) / "checkpoints")
    return 0 if path is None else read_state(path).step


@pytest.fixture(scope="module")
def straight(run, head):
    finish(run, head.environment)
    return run


def test_seeded_kills_leave_the_run_bit_for_bit_as_it_was(straight, head):
    chance = random.Random(7)
    killed = replace(straight, run_dir=f"{straight.run_dir}-killed")
    driver, victims = start(killed, head.environment), []
    while len(victims) < KILLS:
        # Each life gets at least one checkpoint further, so each death is at another place.
        before = saved(killed)
        deadline = time.monotonic() + PATIENCE
        while saved(killed) <= before and driver.poll() is None:
            assert time.monotonic() < deadline, log_of(killed)
            time.sleep(0.1)
        assert driver.poll() is None, log_of(killed)
        time.sleep(chance.uniform(0, 0.3))
        if chance.random() < 0.2:
            driver.kill()
            driver.wait()
            # Its workers end with it; the next ones must not meet them.
            wait_for(lambda: not head.processes(b"RayTrainWorker"))
            victims.append("driver")
            driver = start(killed, head.environment)
        else:
            title = chance.choice([b"RayTrainWorker", b"RayTrainWorker", b"Actor"])
            pids = head.processes(title)
            if pids:
                os.kill(chance.choice(pids), signal.SIGKILL)
                victims.append(title.decode())
    assert driver.wait(timeout=PATIENCE) == 0, log_of(killed)
    assert len(set(victims)) > 1 or KILLS < 5  # so few may all be of one kind
    first, second = final(straight), final(killed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures(killed) == figures(straight)


def figures(run):
    """Every recorded loss by step and name."""
    found = {}
    for record in read_metrics(Path(run.run_dir) / "metrics.jsonl"):
        for name, value in record.items():
            if name.startswith(("loss", "val_")):
                assert (record["step"], name) not in found
                found[record["step"], name] = value
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_grows_with_its_cluster_and_shrinks_when_a_node_is_lost(straight, head):
    workers = WorkersConfig(num_workers=2, min_workers=1, resize_seconds=5, max_failures=-1)
    trainer = replace(straight.trainer, total_steps=LONG, validate_every=None)
    elastic = replace(
        straight, run_dir=f"{straight.run_dir}-elastic", workers=workers, trainer=trainer
    )
    log = Path(elastic.run_dir).with_suffix(".log")

    def groups():
        return re.findall(r"Started training worker group of size (\d)", log.read_text())

    def tail():
        return log_of(elastic)

    def reached(sizes):
        """A group of the last of these sizes, after the others, has made a checkpoint."""
        wait_for(lambda: groups() == sizes or driver.poll() is not None, evidence=tail)
        assert groups() == sizes, log_of(elastic)
        before = saved(elastic)
        wait_for(lambda: saved(elastic) > before or driver.poll() is not None, evidence=tail)
        assert driver.poll() is None, log_of(elastic)

    with running_nodes(head.environment) as nodes:
        nodes.add()
        driver = nodes.drive(JOB, json.dumps(to_dict(elastic)), log)
        reached(["1"])
        second = nodes.add()
        reached(["1", "2"])
        nodes.lose(second)
        del second
        assert driver.wait(timeout=PATIENCE) == 0, log_of(elastic)
    assert groups() == ["1", "2", "1"]
    assert read_state(latest_checkpoint(Path(elastic.run_dir) / "checkpoints")).step == LONG
    found, wanted = figures(elastic), figures(straight)
    assert {step for step, _ in found} == set(range(1, LONG + 1))
    for (step, name), value in wanted.items():
        if name.startswith("loss"):
            assert found[step, name] == pytest.approx(value, rel=1e-3, abs=1e-4)
