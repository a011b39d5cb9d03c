"""Runs that begin with another run's weights, in one process and on Ray under every engine.

Slow: each of the five runs on Ray starts two processes that import torch and DeepSpeed.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.caches import build_small_cache
from tests.fixtures.worlds import CAPTIONS
from tinyflux.config import RunConfig
from tinyflux.distributed.config import WorkersConfig
from tinyflux.distributed.train_local import train_local
from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of three steps on a small cache."""
    folder = tmp_path_factory.mktemp("begun")
    configs = build_small_cache(folder, [*CAPTIONS] * 3, sol_standardize=True)
    trainer = TrainerConfig(
        learning_rate=1e-3,
        warmup_steps=0,
        lr_scheduler="constant",
        gradient_accumulation=1,
        batch_size=4,
        total_steps=3,
        save_every_steps=1,
        sample_every=None,
        log_every=1,
        val_fraction=0.0,
        dtype=torch.float32,
    )
    run = RunConfig(
        run_dir=str(folder / "base"), data=configs.data, zoo=configs.zoo,
        cache=configs.cache, model=configs.model,
        trainer=trainer, workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5),
    )  # fmt: skip
    train_local(run)
    return run


def after(run, name, model=None, **trainer):
    """A run that begins with what ``run`` left."""
    trainer = {"init_from": run.run_dir, "seed": 1, **trainer}
    return replace(
        run,
        run_dir=str(Path(run.run_dir).parent / name),
        trainer=replace(run.trainer, **trainer),
        model=replace(run.model, **(model or {})),
    )


def losses(run):
    return [record["loss"] for record in read_metrics(Path(run.run_dir) / "metrics.jsonl")
            if "loss" in record]  # fmt: skip


def began(run):
    return json.loads((Path(run.run_dir) / "final" / "training.json").read_text())["init_from"]


@pytest.fixture(scope="module")
def local(base):
    """A finished run in one process that began with the EMA of ``base``."""
    run = after(base, "local")
    train_local(run)
    return run


def test_a_run_begins_with_the_weights_and_says_so(base, local):
    alone = after(base, "alone", init_from=None)
    train_local(alone)
    assert losses(local)[0] != pytest.approx(losses(alone)[0], rel=1e-3)
    digest = json.loads((Path(base.run_dir) / "final" / "training.json").read_text())["files"]
    assert began(local) == {"source": base.run_dir, "sha256": digest["model.safetensors"]}
    assert began(alone) == {}
    first = after(base, "still", learning_rate=1e-12, weight_decay=0.0, total_steps=1)
    train_local(first)
    ours, theirs = (
        load_file(Path(run.run_dir) / "final" / "model.safetensors") for run in (first, base)
    )
    for name, tensor in theirs.items():  # Sol's units among them
        torch.testing.assert_close(ours[name], tensor)


def test_a_run_that_goes_on_does_not_read_them_again(base, local, tmp_path, caplog):
    source = shutil.copytree(base.run_dir, tmp_path / "source")
    run = after(base, "stopped", init_from=str(source))
    train_local(replace(run, trainer=replace(run.trainer, total_steps=1)))
    shutil.rmtree(source)
    train_local(run)
    assert losses(run) == losses(local)
    with pytest.raises(ConfigError, match=r"began with the weights of .*init_from is null"):
        train_local(replace(run, trainer=replace(run.trainer, init_from=None, total_steps=4)))
    moved = replace(run.trainer, init_from="elsewhere", total_steps=4)
    train_local(replace(run, trainer=moved))
    assert "trainer.init_from 'elsewhere' is not read" in caplog.text


def test_a_run_takes_the_weights_to_larger_patches(base):
    run = after(base, "patches", model={"patch_size": 2})
    train_local(run)
    weights = load_file(Path(run.run_dir) / "final" / "model.safetensors")
    assert weights["img_in.weight"].shape == (32, 16)


def test_weights_that_do_not_fit_are_refused_before_anything_is_begun(base):
    run = after(base, "misfit", model={"num_single_layers": 3})
    with pytest.raises(CheckpointError, match=r"final/model\.safetensors' does not fit the model"):
        train_local(run)
    assert not Path(run.run_dir).exists()


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_every_engine_on_ray_begins_like_one_process(base, local, engine, stage):
    ray = pytest.importorskip("ray")
    pytest.importorskip("deepspeed")
    from tinyflux.distributed.train import train

    run = after(base, f"{engine}{stage}")
    run.workers = replace(base.workers, engine=engine, zero_stage=stage)
    try:
        train(run)
    finally:
        if stage == 3:
            ray.shutdown()
    assert losses(run) == pytest.approx(losses(local), rel=1e-4)
    assert began(run) == began(local)
