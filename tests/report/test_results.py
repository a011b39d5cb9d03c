"""An evaluation's figures in the model card and in trackers."""

import json

import pytest

from tinyflux.config import RunConfig
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.record import Measured, SetFigures, SpaceFigures
from tinyflux.report.results import named_figures, pass_on_figures
from tinyflux.trainer.config import TrainerConfig


def measured():
    spaces = [
        SpaceFigures(name, "", {"kid": Estimate(value)})
        for name, value in (("efficientnet-lite0", 0.5), ("clip:a/b", 0.25), ("clip:c", 0.125))
    ]
    return Measured("abc", 4, 2.0, 1, [SetFigures("pairs", 9, 9, spaces)])


def test_every_figure_has_a_name_of_its_own():
    assert named_figures(measured()) == {
        "eval_pairs_kid": 0.5,
        "eval_pairs_kid_clip": 0.25,
        "eval_pairs_kid_clip2": 0.125,
    }


def test_the_card_and_the_trackers_get_them_at_the_last_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = [{"step": step, "loss": 1.0} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "final").mkdir()
    card = tmp_path / "final" / "README.md"
    card.write_text("---\nlibrary_name: tinyflux\n---\n# Card\n")
    run = RunConfig(run_dir=str(tmp_path), trainer=TrainerConfig(trackers=["tensorboard"]))
    pass_on_figures(run, measured())
    assert "| KID | efficientnet-lite0 | 0.5 |" in card.read_text()
    assert f"name: {tmp_path.name}\n" in card.read_text()
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "evaluation/pairs_kid", "evaluation/pairs_kid_clip", "evaluation/pairs_kid_clip2",
    }  # fmt: skip
    (told,) = events.Scalars("evaluation/pairs_kid")
    assert (told.step, told.value) == (10, 0.5)


def test_a_run_without_card_and_trackers_needs_neither(tmp_path):
    run = RunConfig(run_dir=str(tmp_path / "run"), trainer=TrainerConfig(trackers=[]))
    pass_on_figures(run, measured())
    assert not (tmp_path / "run").exists()
