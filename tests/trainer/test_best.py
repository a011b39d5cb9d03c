"""The best checkpoint is found, marked, kept from pruning, and found again."""

import json

import pytest
import torch

from tests.fixtures.fake_zoo import FakeZoo
from tests.fixtures.students import make_batch
from tests.fixtures.trainers import make_trainer
from tinyflux.data.batches import HeldOut
from tinyflux.errors import ConfigError, InputError
from tinyflux.evaluation.drawing import DrawSettings
from tinyflux.inference.sampler import Sampler
from tinyflux.storage.folder import LocalFolder
from tinyflux.trainer.best import Best, BestCheckpoint, read_best
from tinyflux.trainer.checkpoint import load_checkpoint
from tinyflux.trainer.checkpoint_search import checkpoints_by_step
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.direction import lower_is_better
from tinyflux.trainer.metrics import read_metrics
from tinyflux.trainer.picture_figures import figures_of_pictures

CAPTIONS = ["a red cat", "a dog", "two birds", "one fish", "no horse", "a green cow", "a hen"]


class Colours:
    """An extractor without weights: each picture's mean and spread of every colour."""

    def __init__(self, name="colours"):
        self.name = self.fingerprint = name

    def __call__(self, pictures):
        return torch.cat([pictures.mean((2, 3)), pictures.std((2, 3))], dim=1)


def real_pictures():
    return torch.rand(len(CAPTIONS), 3, 32, 48, generator=torch.Generator().manual_seed(5))


def make(directory, figures=None, **changes):
    """A trainer whose learning rate makes things worse from some step on, and its sampler."""
    settings = {
        "learning_rate": 0.2, "warmup_steps": 8, "grad_clip": 0.0, "enable_lune": False,
        "enable_sol": False, "save_every_steps": 2, "validate_every": 2,
        "keep_last_n_steps": 1, "best_metric": "val_velocity", "total_steps": 8,
    }  # fmt: skip
    return make_trainer(
        directory,
        held_out=HeldOut([make_batch(seed=9)[:3]], [["a", "b", "c"]]),
        figures=figures,
        **{**settings, **changes},
    )


def measured(trainer, names=("colours",)):
    sampler = Sampler(FakeZoo(), trainer.model, trainer.ema, "cpu", torch.float32)
    how = DrawSettings(num_steps=2, guidance_scale=2.0, negative_prompt="")
    extractors = [Colours(name) for name in names]
    return figures_of_pictures(sampler, extractors, CAPTIONS, real_pictures(), how, batch_size=4)


def recorded(directory, metric):
    records = read_metrics(directory / "logs" / "metrics.jsonl")
    return {one["step"]: one[metric] for one in records if metric in one}


def kept(directory):
    return sorted(path.name for path in (directory / "checkpoints").glob("step_*"))


def marked(directory):
    return read_best(directory / "checkpoints" / "best.json")


@pytest.mark.parametrize("in_thread", [True, False])
def test_the_best_stays_when_later_ones_push_it_out(tmp_path, in_thread):
    trainer = make(tmp_path, async_checkpoints=in_thread)
    trainer.train(epochs=99)
    values = recorded(tmp_path, "val_velocity")
    best = min([2, 4, 6, 8], key=values.__getitem__)
    assert best < 6  # else this run would have kept it anyhow
    assert marked(tmp_path) == Best(f"step_{best:08d}", best, "val_velocity", values[best])
    assert kept(tmp_path) == [f"step_{best:08d}", "step_00000008"]
    load_checkpoint(tmp_path / "checkpoints" / marked(tmp_path).checkpoint)


def test_a_run_that_goes_on_keeps_it_and_finds_it_without_the_mark(tmp_path):
    make(tmp_path, total_steps=4).train(epochs=99)
    mark = tmp_path / "checkpoints" / "best.json"
    for total, lost in ((6, False), (8, True)):
        if lost:  # a kill between a checkpoint and its mark
            mark.write_text(json.dumps({"checkpoint": "step_00000099"}))
        trainer = make(tmp_path, total_steps=total)
        trainer.load_checkpoint(str(tmp_path / "checkpoints" / kept(tmp_path)[-1]))
        trainer.train(epochs=99)
        values = recorded(tmp_path, "val_velocity")
        best = min(range(2, total + 1, 2), key=values.__getitem__)
        assert best < total
        assert marked(tmp_path) == Best(f"step_{best:08d}", best, "val_velocity", values[best])
        assert kept(tmp_path) == [f"step_{best:08d}", f"step_{total:08d}"]


def test_a_run_that_goes_back_forgets_what_it_has_not_reached(tmp_path):
    names = {2: "step_00000002", 6: "step_00000006"}
    for name in names.values():
        (tmp_path / name).mkdir()
    found = BestCheckpoint("eval_recall", tmp_path / "best.json", LocalFolder(tmp_path))
    found._names = names
    for step, value in ((2, 0.5), (4, 0.9), (6, 0.6), (8, None)):
        found.consider(step, {"eval_recall": value})
    found.mark()
    # More is better of it; step 4 has no checkpoint, and step 8 no number.
    assert read_best(tmp_path / "best.json") == Best(names[6], 6, "eval_recall", 0.6)
    assert found.spared == {names[6]}
    again = BestCheckpoint("eval_recall", tmp_path / "best.json", LocalFolder(tmp_path))
    again.resume([{"step": 2, "eval_recall": 0.5}])  # neither directory holds a checkpoint
    assert again.spared == set()
    assert not (tmp_path / "best.json").exists()


def test_figures_of_pictures_are_taken_beside_training_and_choose(tmp_path):
    changes = {"evaluate_every": 2, "best_metric": "eval_kid", "validate_every": None}
    trainer = make(tmp_path, figures=measured, learning_rate=1e-3, **changes)
    trainer.train(epochs=99)
    values = recorded(tmp_path, "eval_kid")
    assert sorted(values) == [2, 4, 6, 8]
    assert len(set(values.values())) == 4
    assert marked(tmp_path).value == min(values.values())
    # At the end they are what measuring the finished EMA gives.
    assert measured(trainer).measure()["eval_kid"] == values[8]
    # And they change nothing in training.
    alone = make(tmp_path / "alone", learning_rate=1e-3, best_metric=None)
    alone.train(epochs=99)
    for name, tensor in alone.ema.shadow.items():
        assert torch.equal(tensor, trainer.ema.shadow[name]), name


def test_figures_that_were_lost_with_a_kill_are_taken_again(tmp_path):
    changes = {"evaluate_every": 2, "best_metric": "eval_kid", "validate_every": None}
    make(tmp_path, figures=measured, total_steps=4, **changes).train(epochs=99)
    whole = recorded(tmp_path, "eval_kid")
    log = tmp_path / "logs" / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines()
             if not (json.loads(line)["step"] == 4 and "eval_kid" in line)]  # fmt: skip
    log.write_text("\n".join([*lines, ""]))
    trainer = make(tmp_path, figures=measured, total_steps=6, **changes)
    trainer.load_checkpoint(str(tmp_path / "checkpoints" / "step_00000004"))
    trainer.train(epochs=99)
    again = recorded(tmp_path, "eval_kid")
    assert sorted(again) == [2, 4, 6]
    assert {step: again[step] for step in whole} == whole
    assert checkpoints_by_step(LocalFolder(tmp_path / "checkpoints")).keys() >= {
        marked(tmp_path).step, 6,
    }  # fmt: skip


def test_each_extractor_has_its_names(tmp_path):
    trainer = make(tmp_path)
    values = measured(trainer, ("colours", "clip:openai/clip")).measure()
    assert values["eval_kid"] == values["eval_kid_clip"]
    assert {"eval_fid", "eval_precision", "eval_coverage_clip"} <= values.keys()
    with pytest.raises(ConfigError, match="has two of one kind"):
        measured(trainer, ("clip:a", "clip:b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "eval_kidd"}, r"best_metric: 'eval_kidd' is no .* mean 'eval_kid'"),
        ({"best_metric": "eval_kid"}, "needs trainer.evaluate_every"),
        ({"best_metric": "val_velocity"}, "needs trainer.validate_every"),
        ({"best_metric": "eval_kid", "evaluate_every": 1500}, "a multiple of trainer.save_every"),
        ({"evaluate_pictures": 0}, "evaluate_pictures must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, or null"),
    ],
)
def test_what_could_never_be_found_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**changes)


def test_a_trainer_that_cannot_measure_says_so(tmp_path):
    with pytest.raises(InputError, match=r"pass Trainer\.setup figures"):
        make(tmp_path, evaluate_every=2)
    trainer = make(tmp_path)
    sampler = Sampler(FakeZoo(), trainer.model, trainer.ema, "cpu", torch.float32)
    how = DrawSettings(2, 1.0, "")
    with pytest.raises(ConfigError, match="at least 6 held-out pictures"):
        figures_of_pictures(sampler, [Colours()], CAPTIONS[:5], real_pictures()[:5], how)
    with pytest.raises(InputError, match="multiples of 8"):
        figures_of_pictures(sampler, [Colours()], CAPTIONS, real_pictures()[..., :30], how)


def test_the_direction_is_known_by_the_metric():
    lower = ["val_velocity_ema", "eval_kid", "eval_fid_clip", "eval_cmmd_clip", "loss"]
    assert all(map(lower_is_better, lower))
    higher = ["eval_precision", "eval_recall", "eval_clip_score_clip", "eval_retrieval"]
    assert not any(map(lower_is_better, higher))
