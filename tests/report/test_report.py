"""The report's page from what stages leave in a run's directory."""

import json

import pytest
from PIL import Image

from tinyflux.config import RunConfig
from tinyflux.evaluation.config import EvaluationSet
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.record import DrawnPicture, Measured, SetFigures, SpaceFigures
from tinyflux.report.report import write_report
from tinyflux.util.config import to_dict

PROMPT = "<b>red & green</b>"
SHARES = {"top1": 0.75, "top5": 1.0}


@pytest.fixture
def run(tmp_path):
    """A run of a few files, evaluated on one picture."""
    for name in ("evaluation/000.png", "evaluation/000.data.png", "samples/step_00000004.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    lines = [{"step": step, "loss": 1 / step, "loss_main": 1 / step} for step in (1, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = {"prompt": PROMPT, "picture": "000.png", "reference": "000.data.png"}
    nearest = {"count": 4, "trained": SHARES, "untrained": SHARES, "pictures": [pair]}
    record = {"parameters": 2_400_000, "machine": "2 cores", "nearest": nearest}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    return RunConfig(run_dir=str(tmp_path))


def test_a_page_needs_no_more_than_training_and_evaluation(run, tmp_path):
    assert write_report(run) == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "2.4M parameters, 4 steps" in page
    assert "<div class=big>75%</div>of 4 pictures" in page
    assert "chance 25%" in page
    assert "After step 4" in page
    assert "held-out velocity loss" not in page
    assert "Over HTTP" not in page
    assert "toy world" not in page
    assert page.count("<svg ") == 1  # no teacher, nothing held out


def test_a_page_tells_of_stages_losses_and_the_server_and_quotes_every_text(run, tmp_path):
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    losses = {"trained": {"val_velocity": 0.5}, "untrained": {"val_velocity": 2.0}, "count": 9}
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "held_out": losses}))
    stage = {"title": "say <it>", "command": "python -m <x>", "seconds": 2.0, "settings": ""}
    (tmp_path / "stages.json").write_text(json.dumps({"train": stage, "report": stage}))
    (tmp_path / "served.json").write_text(json.dumps({"prompt": PROMPT, "seconds": 0.25}))
    Image.new("RGB", (8, 8)).save(tmp_path / "served.png")
    write_report(run)
    page = (tmp_path / "report.html").read_text()
    assert "<div class=big>0.500</div>held-out velocity loss" in page
    assert "untrained student 2.000" in page
    assert "python -m &lt;x&gt;" in page
    assert f"{4 * run.trainer.batch_size / 2:.0f} samples/s with start-up" in page
    assert page.count("&lt;b&gt;red &amp; green&lt;/b&gt;") == 7  # three figures twice, and HTTP's
    assert PROMPT not in page


def test_a_page_has_the_figures_of_each_set_and_its_pictures(run, tmp_path):
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    figures = {
        "thing_accuracy": Estimate(0.62, 0.55, 0.69, 60),
        "fid": Estimate(9.0, note="<high>"),
    }
    space = SpaceFigures("classifier", "abc", figures, {"thing": Estimate(0.5, 0.4, 0.6, 90)})
    shown = DrawnPicture(PROMPT, "evaluation/000.png", "evaluation/000.data.png")
    sets = [
        SetFigures("pairs", 60, 60, [space], pictures=[shown]),
        SetFigures("held_out", 7, 7, [SpaceFigures("clip:a/b", "d")],
                   pictures=[DrawnPicture("none", "evaluation/000.png")]),
    ]  # fmt: skip
    run.evaluate.sets = [EvaluationSet("pairs", "pairs.parquet", about="Seen <apart>.")]
    evaluation["measured"] = to_dict(Measured("abc", 4, 2.0, 1, sets))
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    write_report(run)
    page = (tmp_path / "report.html").read_text()
    assert "<h3>pairs</h3>" in page
    assert "<p>Seen &lt;apart&gt;.</p>" in page
    assert "60 captions, 60 pictures" in page
    assert "<td>62% (55% to 69%)</td>" in page
    assert "classifier: &lt;high&gt;" in page
    assert "that it never saw, classifier reaches" in page
    assert "thing 50% (40% to 60%)" in page
    assert page.count('alt="drawn: ') == 2
    assert page.count('alt="real: ') == 1  # a cache's own pictures are not kept
