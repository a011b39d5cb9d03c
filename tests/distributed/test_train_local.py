"""``tinyflux train --local``: the whole of a training where there is no Ray.

Slow: four processes import torch.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.caches import build_small_cache
from tests.fixtures.waiting import PATIENCE
from tests.fixtures.worlds import CAPTIONS
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import WorkersConfig
from tinyflux.inference.sampler import Sampler
from tinyflux.model.loader import load_model
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WITHOUT_RAY = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None  # whoever imports them fails
from tinyflux.cli.main import run_job
sys.exit(run_job("train", sys.argv[1:]))
"""
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a small cache of random models; its workers do not matter here."""
    folder = tmp_path_factory.mktemp("local")
    configs = build_small_cache(folder, [*CAPTIONS] * 3, sol_standardize=True)
    trainer = TrainerConfig(
        learning_rate=1e-3,
        lr_scheduler="constant",
        gradient_accumulation=2,
        batch_size=4,
        total_steps=STEPS,
        save_every_steps=2,
        keep_last_n_steps=2,
        validate_every=3,
        sample_every=3,
        sample_prompts=CAPTIONS[:2],
        sample_steps=1,
        log_every=1,
        val_fraction=0.2,
        dtype=torch.float32,
    )
    workers = WorkersConfig(num_workers=3, min_workers=2, zero_stage=3, offload=True)
    return RunConfig(
        run_dir=str(folder / "run"), data=configs.data, zoo=configs.zoo,
        cache=configs.cache, model=configs.model,
        trainer=trainer, workers=workers,
    )  # fmt: skip


def train(run, *options):
    """What ``tinyflux train --local`` says."""
    file = Path(run.run_dir).with_suffix(".yaml")
    save_run_config(run, file)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, "--local", "--config", str(file), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def final(run):
    return load_file(Path(run.run_dir) / "final" / "model.safetensors")


def figures(run):
    """Every recorded loss by step and name."""
    return {
        (record["step"], name): value
        for record in read_metrics(Path(run.run_dir) / "metrics.jsonl")
        for name, value in record.items()
        if name.startswith(("loss", "val_"))
    }


def test_a_local_run_leaves_what_a_run_leaves_and_goes_on_bit_for_bit(run):
    said = train(run)
    root = Path(run.run_dir)
    assert f"trained: {root / 'final'}" in said
    assert "continuing from" not in said
    assert "the EMA was best at step" in said
    assert {path.name for path in root.iterdir()} >= {
        "config.yaml", "checkpoints", "metrics.jsonl", "samples", "tb", "final",
    }  # fmt: skip
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == [
        "step_00000004", "step_00000006",
    ]  # fmt: skip
    assert sorted(path.name for path in (root / "final").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "samples.png", "training.json",
    ]  # fmt: skip
    model = load_model(root / "final", device="cpu", dtype=torch.float32)
    assert model.sol_units.measured
    assert "training is finished" in train(run)

    stopped = replace(run, run_dir=f"{run.run_dir}-stopped")
    train(stopped, "--trainer.total_steps", "3")
    assert "continuing from" in train(stopped)
    first, second = final(run), final(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures(stopped) == figures(run)


def test_projectors_go_on_with_their_run_and_are_no_part_of_its_result(run):
    options = ["--trainer.align", "[{group: latents, block: 1, stop: 0.7}, "
               "{group: latents, block: 2, projector: conv, shuffle: true}]"]  # fmt: skip
    whole, killed = (replace(run, run_dir=f"{run.run_dir}-{name}") for name in ("align", "again"))
    train(whole, *options)
    # As after a kill: what follows the checkpoint of step 4 is gone, and only that one is there.
    train(killed, *options)
    for left in ("final", "checkpoints/step_00000006"):
        shutil.rmtree(Path(killed.run_dir) / left)
    assert "continuing from" in train(killed, *options)
    first, second = final(whole), final(killed)
    assert first.keys() == second.keys() == load_model(
        Path(whole.run_dir) / "final", device="cpu"
    ).state_dict().keys()  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = [load_file(Path(one.run_dir) / "checkpoints/step_00000006/projectors.safetensors")
            for one in (whole, killed)]  # fmt: skip
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    records = read_metrics(Path(whole.run_dir) / "metrics.jsonl")
    assert all(record["align_latents_2"] > 0 for record in records if "loss" in record)


def test_an_adapter_is_trained_on_a_finished_run_and_draws(run, tmp_path):
    base = Path(run.run_dir) / "final"
    if not base.exists():
        train(run)
    options = ["--trainer.init_from", run.run_dir, "--trainer.adapter.kind", "dora",
               "--trainer.adapter.rank", "4", "--workers.engine", "torch",
               "--workers.offload", "false"]  # fmt: skip
    style = replace(run, run_dir=f"{run.run_dir}-style")
    assert "an adapter is trained on the weights of" in train(style, *options)
    made = Path(style.run_dir) / "final"
    assert sorted(path.name for path in made.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.json",
        "samples.png", "training.json",
    ]  # fmt: skip
    assert f'load_model("{base}", adapter="final")' in (made / "README.md").read_text()

    stopped = replace(run, run_dir=f"{run.run_dir}-style-stopped")
    train(stopped, *options, "--trainer.total_steps", "3")
    assert "continuing from" in train(stopped, *options)
    first, second = (load_file(Path(one.run_dir) / "final" / "adapter_model.safetensors")
                     for one in (style, stopped))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert figures(stopped) == figures(style)

    zoo = run.zoo.build(run.model)
    plain, drawn = (
        Sampler(zoo, load_model(place, device="cpu", dtype=torch.float32), None, "cpu",
                torch.float32).generate(CAPTIONS[:2], 2, 1.0, 4, 4, seed=0)
        for place in (base, made)
    )  # fmt: skip
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, plain)
