"""``tinyflux cache build --local``: without Ray the dataset that Ray builds.

Slow: the last test has the same dataset built on a real Ray.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fixtures import keeper
from tests.fixtures.caches import CAPTIONS
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig, VariantsConfig
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.config import RunConfig, save_run_config

ROOT = Path(__file__).parents[2]
WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # whoever imports it fails
from tinyflux.cli.main import run_job
sys.exit(run_job("cache", sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run file's settings, to be built in several places."""
    folder = tmp_path_factory.mktemp("local")
    write_pictures(folder / "pictures", CAPTIONS)
    torch.set_num_threads(1)
    return RunConfig(
        data=DataConfig(
            str(folder / "pictures"), height=16, width=16, variants=VariantsConfig(flips=True)
        ),
        zoo=zoo_config(make_world(folder / "world")),
        cache=CacheConfig(rows_per_shard=4, batch_size=3),
        model=student_config(),
    )


@pytest.fixture
def file_of(run, tmp_path):
    """Writes a run file whose cache is ``NAME/cache``."""

    def write(name):
        run.cache.path = str(tmp_path / name / "cache")
        save_run_config(run, tmp_path / f"{name}.yaml")
        return str(tmp_path / f"{name}.yaml"), Path(run.cache.path)

    return write


def without_ray(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return keeper.start([sys.executable, "-c", WITHOUT_RAY, *arguments], env=environment)


def dataset(path):
    """All bytes of what readers are told of."""
    names = ["manifest.json", *(p.relative_to(path) for p in path.glob("*.safetensors"))]
    names += [p.relative_to(path) for p in path.glob("shards/*")]
    return {str(name): (path / name).read_bytes() for name in names}


def test_a_process_without_ray_builds_continues_and_repairs(run, file_of, capfd):
    file, path = file_of("alone")
    process = without_ray("build", "--local", "--config", file)
    wait_for(lambda: list(path.glob("receipts/*.json")) or process.poll() is not None, every=0.01)
    process.kill()
    process.wait(PATIENCE)
    assert list(path.glob("receipts/*.json"))
    assert not (path / "manifest.json").exists()
    assert without_ray("build", "--config", file, "--local").wait(PATIENCE) == 0
    assert " rows are there as they should be" in capfd.readouterr().out

    _, other = file_of("straight")
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build(configs, LocalRunner(configs))
    built = dataset(other)
    assert len(built) > 4
    assert dataset(path) == built

    os.truncate(next(path.glob("shards/*.sol.*")), 100)
    assert without_ray("repair", "--local", "--config", file).wait(PATIENCE) == 0
    assert dataset(path) == built


def test_without_the_flag_it_is_rays_work(file_of, capfd):
    file, _ = file_of("rays")
    assert without_ray("build", "--config", file).wait(PATIENCE) == 1
    assert "No module named 'ray" in capfd.readouterr().err


@pytest.mark.slow
def test_ray_builds_the_same_bytes_and_continues_what_was_begun_without_it(file_of, head):
    file, alone = file_of("alone")
    assert without_ray("build", "--local", "--config", file).wait(PATIENCE) == 0
    file, by_ray = file_of("by-ray")
    command = [sys.executable, "-m", "tinyflux", "cache", "build", "--config", file]
    subprocess.run(command, env=head.environment, cwd=ROOT, check=True, timeout=PATIENCE)
    assert dataset(by_ray) == dataset(alone)
    for receipt in sorted(by_ray.glob("receipts/*.json"))[::2]:
        receipt.unlink()
    assert without_ray("build", "--local", "--config", file).wait(PATIENCE) == 0
    assert dataset(by_ray) == dataset(alone)
