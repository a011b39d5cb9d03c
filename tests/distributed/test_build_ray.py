"""The build job on a real Ray: against the bare loop, and through the deaths of its processes.

Slow: drivers and actors that import torch start again after each death; a cluster of three nodes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures import keeper
from tests.fixtures.caches import CAPTIONS, assert_same, changed
from tests.fixtures.ray_head import running_nodes
from tests.fixtures.waiting import PATIENCE, kills, wait_for
from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.distributed.build import refuse_impossible_actor
from tinyflux.errors import ConfigError
from tinyflux.util.config import to_dict

JOB = """
import json, sys
from tinyflux.cache.job import BuildConfigs
from tinyflux.distributed.build import build_cache
from tinyflux.util.config import from_dict
configs = from_dict(BuildConfigs, json.loads(sys.argv[1]), "test")
build_cache(configs.data, configs.zoo, configs.cache, configs.model)
"""


def test_an_actor_that_this_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    refuse_impossible_actor(CacheConfig(cpus_per_actor=2))
    with pytest.raises(ConfigError, match=r"cpus_per_actor is 4, but this machine has 2 CPUs"):
        refuse_impossible_actor(CacheConfig(cpus_per_actor=4))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may grow
    refuse_impossible_actor(CacheConfig(cpus_per_actor=4))


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    captions = [f"{size} {caption}" for size in ("small", "large") for caption in CAPTIONS]
    write_pictures(folder / "pictures", captions)
    torch.set_num_threads(1)  # as in an actor of one CPU
    configs = BuildConfigs(
        DataConfig(str(folder / "pictures"), height=16, width=16),
        zoo_config(make_world(folder / "world")),
        CacheConfig(str(folder / "straight"), rows_per_shard=3, batch_size=2),
        student_config(),
    )
    build(configs, LocalRunner(configs))
    return configs


def start(configs, head):
    return keeper.start(
        [sys.executable, "-c", JOB, json.dumps(to_dict(configs))],
        env=head.environment,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.slow
@pytest.mark.fault
def test_killed_actors_and_drivers_leave_the_dataset_that_a_bare_loop_builds(configs, head):
    """SIGKILLs at seeded moments, of an actor or of the driver; then one run to the end."""
    mine = changed(configs, cache={"path": f"{configs.cache.path}-killed", "num_actors": 2})
    dice = random.Random(1)
    drivers, actors, each = 0, 0, -(-kills(4) // 2)
    receipts = mine.store.directory / "receipts"
    while drivers < each or actors < each:
        driver = start(mine, head)
        count = len(list(receipts.glob("*.json")))
        enough = count + dice.randrange(1, 6)
        while driver.poll() is None and len(list(receipts.glob("*.json"))) < enough:
            time.sleep(0.01)
        time.sleep(dice.random() / 4)
        if actors < each:
            for pid in head.processes(b"ShardActor")[:1]:
                os.kill(pid, signal.SIGKILL)
                actors += 1
        if actors % 2 == 0 or actors >= each:
            driver.kill()
            drivers += 1
            driver.wait()
        else:
            assert driver.wait(timeout=PATIENCE) == 0  # the actor was replaced
        if (mine.store.directory / "manifest.json").exists():
            assert_same(mine.store.directory, configs.store.directory)
            (mine.store.directory / "manifest.json").unlink()
            for path in sorted(receipts.glob("*.json"))[::2]:
                path.unlink()
    assert start(mine, head).wait(timeout=PATIENCE) == 0
    assert_same(mine.store.directory, configs.store.directory)
    assert (
        CachedDataset(mine.store.directory).keys() == CachedDataset(configs.store.directory).keys()
    )


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_loss_of_a_node_leaves_the_dataset_that_a_bare_loop_builds(configs, head, tmp_path):
    mine = changed(configs, cache={"path": f"{configs.cache.path}-lost", "num_actors": 2})
    log = tmp_path / "driver.log"
    with running_nodes(head.environment) as nodes:
        lost = [nodes.add() for _ in range(2)][1]
        driver = nodes.drive(JOB, json.dumps(to_dict(mine)), log)

        def begun():
            assert driver.poll() is None, log.read_text()[-5000:]
            return len(list(mine.store.directory.glob("receipts/*.json"))) >= 2

        wait_for(begun)
        nodes.lose(lost)
        del lost
        assert driver.wait(timeout=PATIENCE) == 0, log.read_text()[-5000:]
    assert "constructor arguments in the object store" not in log.read_text()  # actors keep them
    assert_same(mine.store.directory, configs.store.directory)


@pytest.mark.slow
def test_a_broken_picture_is_one_sentence_through_ray(configs, head, tmp_path):
    folder = write_pictures(tmp_path / "pictures", CAPTIONS)
    (folder / "002.png").write_bytes(b"nothing")
    zoo = configs.zoo
    repos = [f"--zoo.{name}_repo={getattr(zoo, f'{name}_repo')}"
             for name in ("vae", "t5", "clip", "experts", "sd")]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "ray_jobs/build_cache.py", f"--data.folder={folder}", "--data.width=16",
         "--data.height=16", f"--cache.path={tmp_path / 'cache'}", "--zoo.device=cpu",
         "--model.t5_layers=[0,1,2]", *repos],
        cwd=Path(__file__).parents[2],
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert "002.png' is not a picture" in process.stderr.splitlines()[-1]
    assert not (tmp_path / "cache" / "manifest.json").exists()
