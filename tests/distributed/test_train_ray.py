"""Real Ray Train and DeepSpeed on two workers, from a cache that Ray Data built.

Slow: each of the eight runs starts one or two processes that import torch and DeepSpeed.
"""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.ray_head import ray_processes
from tests.fixtures.waiting import PATIENCE, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, zoo_config
from tinyflux.errors import CacheError, ConfigError, TrainingError
from tinyflux.model.loader import load_model
from tinyflux.trainer.best import read_best
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.trainer import Trainer

ray = pytest.importorskip("ray")
pytest.importorskip("deepspeed")

from tinyflux.cache.config import CacheConfig, DataConfig  # noqa: E402
from tinyflux.cache.dataset import CachedDataset  # noqa: E402
from tinyflux.distributed.build import build_cache  # noqa: E402
from tinyflux.distributed.config import SampleConfig, WorkersConfig  # noqa: E402
from tinyflux.distributed.train import train  # noqa: E402
from tinyflux.distributed.train_local import train_local  # noqa: E402
from tinyflux.evaluation.config import EvaluateConfig  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # Ray and DeepSpeed leave sockets and deprecated calls behind.
    pytest.mark.filterwarnings("default"),
]
STEPS = 12
# Of pictures, beside training.
FIGURES = {"evaluate_every": 4, "best_metric": "eval_kid", "evaluate_pictures": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world, and a cache of 40 pictures made with it."""
    root = tmp_path_factory.mktemp("world")
    make_world(root / "world")
    pictures = root / "pictures"
    pictures.mkdir()
    for index in range(40):
        color = (index * 6, 255 - index * 6, index % 5 * 50)
        Image.new("RGB", (16, 16), color).save(pictures / f"{index:03d}.png")
        caption = f"{CAPTIONS[index % len(CAPTIONS)]}"
        (pictures / f"{index:03d}.txt").write_text(caption)
    zoo = zoo_config(root / "world")
    build_cache(
        DataConfig(folder=str(pictures), height=16, width=16),
        zoo,
        CacheConfig(path=str(root / "cache"), cpus_per_actor=0.5, rows_per_shard=16),
        student_config(),
    )
    yield SimpleNamespace(cache=str(root / "cache"), zoo=zoo)
    ray.shutdown()


@pytest.fixture(scope="module")
def make_run(world, tmp_path_factory):
    """Makes runs of two workers whose settings a test changes; each has a directory of its own."""

    def make(name="run", workers=None, **changes):
        trainer = TrainerConfig(
            **{
                "learning_rate": 1e-3,
                "warmup_steps": 2,
                "lr_scheduler": "constant",
                "lune_warmup_steps": 4,
                "sol_warmup_steps": 4,
                "gradient_accumulation": 1,
                "batch_size": 8,
                "total_steps": STEPS,
                "ema_decay": 0.9,
                "save_every_steps": 4,
                "log_every": 1,
                "val_fraction": 0.35,
                "dtype": torch.float32,
                **changes,
            }
        )
        workers = {"cpus_per_worker": 0.5, "num_workers": 2, **(workers or {})}
        return SimpleNamespace(
            run_dir=str(tmp_path_factory.mktemp(name) / name),
            cache=SimpleNamespace(path=world.cache),
            mix=[],
            model=student_config(sol_standardize=True),
            trainer=trainer,
            workers=WorkersConfig(**workers),
            zoo=world.zoo,
            evaluate=EvaluateConfig(),
            sample=SampleConfig(num_steps=1, batch_size=4),
        )

    return make


@pytest.fixture(scope="module")
def straight(make_run):
    """A finished run of two workers, with everything that stands beside the steps."""
    run = make_run(
        "straight",
        validate_every=6,
        sample_every=6,
        sample_prompts=CAPTIONS[:2],
        sample_steps=2,
        **FIGURES,
    )
    assert train(run) == f"{run.run_dir}/final"
    return run


def losses(run):
    records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    return torch.tensor([record["loss"] for record in records if "loss" in record])


def final(run):
    return load_file(Path(run.run_dir) / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def test_a_run_leaves_everything_in_its_directory_and_is_left_alone_when_done(straight):
    run = straight
    root = Path(run.run_dir)
    path = root / "final"
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (4, 8, 12)
    ]
    assert sorted(p.name for p in (root / "samples").glob("*.png")) == [
        "step_00000006.png",
        "step_00000012.png",
    ]
    assert list((root / "tb").iterdir())
    records = read_metrics(root / "metrics.jsonl")
    assert [r["step"] for r in records if "val_velocity_ema" in r] == [0, 6, 12]
    measured = {r["step"]: r["eval_kid"] for r in records if "eval_kid" in r}
    assert sorted(measured) == [4, 8, 12]
    best = read_best(root / "best.json")
    assert best.value == measured[best.step] == min(measured.values())
    model = load_model(str(path), device="cpu", dtype=torch.float32)
    ema = load_file(root / "checkpoints" / "step_00000012" / "ema.safetensors")
    assert same(dict(model.state_dict()), ema)
    card = ModelCard.load(path / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    last = [record for record in records if "val_velocity_ema" in record][-1]
    for said in (
        f"| val_velocity_ema | {last['val_velocity_ema']:.5g} |", "(samples.png)", "12 steps",
        "the teacher Lune", f"SHA-256 `{CachedDataset(run.cache.path).digest}`",
        "| trainer.learning_rate | 0.001 |",
    ):  # fmt: skip
        assert said in card.text, said
    assert (path / "samples.png").read_bytes() == (
        root / "samples" / "step_00000012.png"
    ).read_bytes()

    before = stamps(root)
    assert train(run) == str(path)
    assert stamps(root) == before


def test_workers_accumulation_and_engines_train_alike(make_run, straight):
    """The stages' agreement among themselves is test_zero's, without Ray."""
    whole = make_run("torch-one", {"engine": "torch", "num_workers": 1})
    halves = [  # of a batch, by workers or one after the other
        make_run("torch-two", {"engine": "torch"}),
        make_run("zero1-accumulated", {"num_workers": 1, "zero_stage": 1}, gradient_accumulation=2),
    ]
    for run in (whole, *halves):
        train(run)
    halves.append(straight)
    # Two roundings of a weight above 1, as in test_zero; a mean of one batch rounds otherwise.
    for first, others, close in ((halves[0], halves, 2.5e-7), (whole, halves, 1e-6)):
        for run in others:
            torch.testing.assert_close(losses(run), losses(first), rtol=0, atol=close)
            torch.testing.assert_close(final(run), final(first), rtol=0, atol=close)


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_weights(make_run, straight):
    killed = make_run("killed")
    checkpoints = Path(killed.run_dir) / "checkpoints"
    victims = []

    def kill():
        wait_for((checkpoints / "step_00000004").exists, every=0.005)
        for pid in ray_processes(os.getpid(), b"TrainWorker"):
            victims.append(pid)
            os.kill(pid, signal.SIGKILL)
            return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    train(killed)
    thread.join(PATIENCE)
    assert victims
    assert same(final(killed), final(straight))
    steps = [r["step"] for r in read_metrics(Path(killed.run_dir) / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))


def test_another_number_of_workers_and_the_plain_trainer_continue_a_run(make_run, straight):
    resized = make_run("resized")
    train(replace_total(resized, 4))
    resized.workers = replace(resized.workers, num_workers=1, engine="torch")
    train(resized)
    for name, tensor in final(resized).items():
        torch.testing.assert_close(tensor, final(straight)[name], rtol=0, atol=1e-6)
    trainer = Trainer(load_model(f"{resized.run_dir}/final", device="cpu"), resized.trainer)
    trainer.load_checkpoint(f"{straight.run_dir}/checkpoints/step_00000008")
    assert trainer.current_step == 8


def test_a_run_without_ray_is_the_run_that_ray_makes(make_run, straight):
    local = make_run("local", validate_every=6, sample_every=6, sample_prompts=CAPTIONS[:2],
                     sample_steps=2, **FIGURES)  # fmt: skip
    train_local(replace_total(local, 4))
    assert train_local(local) == f"{local.run_dir}/final"
    torch.testing.assert_close(losses(local), losses(straight), rtol=0, atol=1e-6)
    torch.testing.assert_close(final(local), final(straight), rtol=0, atol=1e-6)
    names = [
        sorted(str(path.relative_to(run.run_dir)) for path in Path(run.run_dir).glob("*/*"))
        for run in (local, straight)
    ]
    kept = [[n for n in found if not n.startswith(("ray/", "tb/"))] for found in names]
    assert kept[0] == kept[1]


def replace_total(run, steps):
    return SimpleNamespace(**{**vars(run), "trainer": replace(run.trainer, total_steps=steps)})


def test_user_errors_are_one_sentence_wherever_they_are_found(make_run, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"must be at least .* 2 \* 5 = 10"):
        train(make_run(gradient_accumulation=5))
    with pytest.raises(ConfigError, match="zero_stage must be 0, 1, 2 or 3, not 4"):
        train(make_run(workers={"zero_stage": 4}))
    with pytest.raises(ConfigError, match="min_workers must be from 1 to"):
        make_run(workers={"min_workers": 3})
    with pytest.raises(ConfigError, match="cannot share a worker's GPU"):
        make_run(workers={"use_gpu": True, "min_workers": 1})
    run = make_run()
    run.cache.path = str(tmp_path / "nowhere")
    with pytest.raises(CacheError, match="nowhere"):
        train(run)
    run = make_run()
    run.model = student_config(t5_layers=(2,))
    with pytest.raises(CacheError, match="t5_layers"):
        train(run)


def test_an_error_inside_a_worker_reaches_the_caller(make_run):
    run = make_run("diverging", total_steps=60, max_nonfinite_steps=2, learning_rate=1e38)
    with pytest.raises(TrainingError, match=r"not finite for \d steps in a row"):
        train(run)
    assert not (Path(run.run_dir) / "final").exists()
    assert not list((Path(run.run_dir) / "ray").glob("*.json"))
