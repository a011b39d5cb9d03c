"""A training that begins before its cache is built.

Slow: six processes import torch, and one test is a run of two workers on a real Ray.
"""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import keeper
from tests.fixtures.caches import build_some, make
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.committed import UNFINISHED_NAME, load_committed
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.manifest import MANIFEST_NAME
from tinyflux.cache.store import LocalStore
from tinyflux.config import RunConfig, save_run_config
from tinyflux.data.ledger import Ledger
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.train_local import train_local
from tinyflux.errors import CacheError, ConfigError
from tinyflux.run_dir import PASSES
from tinyflux.storage.folder import LocalFolder
from tinyflux.trainer.checkpoint_state import read_state
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, SHARD = 90, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def run(world, tmp_path):
    """A run on a cache that nobody has begun to build."""
    torch.set_num_threads(1)
    write_pictures(tmp_path / "pictures", [*CAPTIONS] * 32)
    trainer = TrainerConfig(
        learning_rate=1e-3,
        lr_scheduler="constant",
        gradient_accumulation=1,
        batch_size=4,
        total_steps=STEPS,
        save_every_steps=3,
        validate_every=10,
        sample_every=None,
        log_every=1,
        val_fraction=0.2,
        dtype=torch.float32,
        start_at_rows=SHARD,
    )
    return RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(world),
        cache=CacheConfig(str(tmp_path / "cache"), rows_per_shard=SHARD, batch_size=2),
        model=student_config(sol_standardize=True),
        trainer=trainer,
        workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5),
    )


def start(run, *command):
    """Start a command of a run; the process, and the file with what it says."""
    file = Path(run.run_dir).with_suffix(".yaml")
    save_run_config(run, file)
    line = [sys.executable, "-m", "tinyflux", *command, "--local", "--config", str(file)]
    log = file.with_name(f"{len(list(file.parent.iterdir()))}.log")
    with log.open("wb") as output:
        return keeper.start(line, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT), log


def shards(run):
    """How many of the cache's shards are committed."""
    try:
        return len(load_committed(LocalStore(run.cache.path))[0].shards)
    except CacheError:
        return 0


def passes_of(run):
    return Ledger(LocalFolder(run.run_dir)).load()


def last_step(run):
    file = Path(run.run_dir) / "metrics.jsonl"
    return max((one["step"] for one in read_metrics(file)), default=0) if file.exists() else 0


def kill(process, log):
    assert process.poll() is None, log.read_text()
    process.kill()
    process.wait(PATIENCE)


def end(process, log):
    """What a command said that has done its work."""
    assert process.wait(PATIENCE) == 0, log.read_text()
    return log.read_text()


def build_until(builder, log, run, count):
    """Have the stopped builder commit ``count`` shards, and stop it again."""
    builder.send_signal(signal.SIGCONT)
    wait_for(lambda: shards(run) >= count or builder.poll() is not None, every=0.01)
    builder.send_signal(signal.SIGSTOP)
    assert builder.poll() is None, log.read_text()
    assert not (Path(run.cache.path) / MANIFEST_NAME).exists()


def final(run):
    return load_file(Path(run.run_dir) / "final" / "model.safetensors")


def figures(run):
    """Every recorded loss by step and name; no step is recorded twice."""
    records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert len(steps) == len(set(steps))
    return {
        (record["step"], name): value
        for record in records
        for name, value in record.items()
        if name.startswith(("loss", "val_"))
    }


def test_a_training_beside_a_real_build_is_killed_and_ends_as_one_that_is_not(run):
    builder, built = start(run, "cache", "build")
    build_until(builder, built, run, 3)
    first, log = start(run, "train")
    wait_for(lambda: last_step(run) >= 8 or first.poll() is not None, every=0.01)
    kill(first, log)  # some passes over three shards or so are done
    assert len(passes_of(run).spans) == 1
    assert passes_of(run).decided > 1

    build_until(builder, built, run, shards(run) + 2)
    second, log = start(run, "train")
    wait_for(lambda: len(passes_of(run).spans) > 1 or second.poll() is not None, every=0.01)
    kill(second, log)  # perhaps before a checkpoint knows of the second list

    builder.send_signal(signal.SIGCONT)
    end(builder, built)
    assert not (Path(run.cache.path) / UNFINISHED_NAME).exists()
    assert "takes in new shards" in end(*start(run, "train"))

    decided = passes_of(run)
    assert decided.finished
    counts = [span.counts[0] for span in decided.spans]
    assert counts == sorted(set(counts))
    assert len(counts) >= 3
    assert counts[-1] == shards(run)
    state = read_state(max((Path(run.run_dir) / "checkpoints").glob("step_*")))
    assert state.passes == decided
    assert state.epoch >= decided.decided - 1

    # The file of passes and the seed are all that such a run is made of.
    straight = replace(run, run_dir=f"{run.run_dir}-straight")
    Path(straight.run_dir).mkdir()
    shutil.copy(Path(run.run_dir) / PASSES, straight.run_dir)
    end(*start(straight, "train"))
    assert passes_of(straight) == decided
    assert figures(straight) == figures(run)
    one, other = final(straight), final(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def changed(run, **changes):
    return replace(run, trainer=replace(run.trainer, **changes))


def test_a_run_goes_on_as_it_began_and_says_what_it_lacks(run):
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    run = changed(run, total_steps=2, validate_every=None)
    build_some(configs, 2)
    rows = load_committed(configs.store)[0].rows
    with pytest.raises(CacheError, match=f"hold {rows} rows so far, and trainer.start_at_rows"):
        train_local(changed(run, start_at_rows=rows + 1))
    with pytest.raises(CacheError, match="is not finished"):
        train_local(changed(run, start_at_rows=None))
    train_local(run)
    make(configs)
    longer = changed(run, total_steps=3)
    with pytest.raises(ConfigError, match=r"began with trainer\.start_at_rows, and the order"):
        train_local(changed(longer, start_at_rows=None))
    with pytest.raises(ConfigError, match=r"began with trainer\.batch_size = 4, not 6, and its"):
        train_local(changed(longer, batch_size=6))
    train_local(changed(longer, start_at_rows=999))  # a floor for the beginning
    plain = replace(changed(run, start_at_rows=None), run_dir=f"{run.run_dir}-plain")
    train_local(plain)
    with pytest.raises(ConfigError, match=r"began without trainer\.start_at_rows"):
        train_local(changed(plain, start_at_rows=1, total_steps=3))


@pytest.mark.filterwarnings("default")
def test_workers_on_ray_read_what_one_process_reads(run):
    ray = pytest.importorskip("ray")
    pytest.importorskip("deepspeed")
    from tinyflux.distributed.train import train

    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build_some(configs, 3)
    workers = replace(run.workers, engine="torch")
    run = replace(changed(run, total_steps=7, validate_every=7), workers=workers)
    longer = changed(run, total_steps=14)
    alone = replace(longer, run_dir=f"{run.run_dir}-alone")
    try:
        train(run)
        assert len(passes_of(run).spans) == 1
        make(configs)
        train(longer)
    finally:
        ray.shutdown()
    decided = passes_of(run)
    assert decided.finished
    assert len(decided.spans) == 2
    Path(alone.run_dir).mkdir()
    shutil.copy(Path(run.run_dir) / PASSES, alone.run_dir)
    train_local(alone)
    own, others = figures(alone), figures(longer)
    assert (14, "loss") in own
    assert own.keys() == others.keys()
    for place, value in own.items():
        assert others[place] == pytest.approx(value, rel=1e-4, abs=1e-5), place
