"""A comparison's page from a record and the trials' grids."""

import json
import re

import pytest
from PIL import Image

from tinyflux.compare.analysis import compare
from tinyflux.compare.page import make_page
from tinyflux.compare.record import ArmRecord, CompareRecord, Curve, TrialRecord
from tinyflux.compare.results import to_json
from tinyflux.storage.folder import LocalFolder

LAST = {
    "base": [1.0, 1.2, 1.1],
    "same": [1.0, 1.2, 1.1],
    "far": [0.5, 0.71, 0.6],
    "near": [1.1, 1.1, 1.2],
}


def make(folder, last=LAST, pictures=True):
    """A comparison of arms with these last values by seed."""
    trials = []
    for arm, values in last.items():
        for seed, value in enumerate(values):
            curve = Curve([0, 5, 10], [0.0, 1.0, 2.0], [2.0, 1.5, value])
            place = f"runs/{arm}/seed-{seed}"
            trials.append(TrialRecord(arm, seed, seed, place, "2 <cores>", 1, 2.0, {"loss": curve}))
            if pictures:
                grid = folder / place / "samples" / "step_00000010.png"
                grid.parent.mkdir(parents=True)
                Image.new("RGB", (8, 4), "red").save(grid)
    curves = {arm: [trial.curves["loss"] for trial in trials if trial.arm == arm] for arm in last}
    pairs = [*((arm, "base") for arm in last if arm != "base"), ("far", "near")]
    arms = [
        ArmRecord(arm, {"trainer.shift": "<3>"}, "far" if arm == "near" else None, 0)
        for arm in last
    ]
    return CompareRecord(
        name="mine", metric="loss", metrics=["loss"], lower_is_better=True,
        seeds=list(range(len(last["base"]))), steps=10, batch_size=4, base="run.yaml", settings={},
        rows=90, held_out=10, arms=arms, trials=trials,
        comparisons=[
            compare(arm, to, "loss", curves[arm], curves[to], True) for arm, to in pairs
        ],
        stages={"trials": 3.0},
    )  # fmt: skip


def page_of(record, folder):
    return make_page(record, LocalFolder(folder))


def test_a_page_says_what_can_be_told_apart(tmp_path):
    page = page_of(make(tmp_path), tmp_path)
    verdicts = re.findall(r'<p class="verdict([^"]*)">(.*?)</p>', page)
    assert verdicts[0] == (" zero", "same and base have exactly the same value with every seed.")
    assert verdicts[1] == ("", "far is better than base: -0.4967 ± 0.0143 (3 seeds).")
    assert verdicts[2][0] == " zero"
    assert verdicts[2][1].startswith("near cannot be told from base: +0.0333 ± ")
    assert len(verdicts) == 4
    assert page.count("<svg ") == 2
    assert page.count("data:image/png;base64,") == 12
    assert "control of far" in page
    # far: from 1.5 to 0.5, 0.71 and 0.6; the base's last values lie 2.5, 1.9 and 2.2 steps on.
    assert "step 7 of 10, 1.4 s (median)" in page
    assert "90 samples to train on and\n10 held out" in page


def test_every_text_is_quoted_and_nothing_is_fetched(tmp_path):
    page = page_of(make(tmp_path), tmp_path)
    assert "2 &lt;cores&gt;" in page
    assert "&lt;3&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_one_seed_without_pictures_still_makes_a_page(tmp_path):
    record = make(tmp_path, {arm: values[:1] for arm, values in LAST.items()}, pictures=False)
    page = page_of(record, tmp_path)
    assert "far is -0.5000 from base with one seed, which has no interval." in page
    assert "What the arms draw" not in page


def test_a_trial_that_was_not_finite_is_said(tmp_path):
    record = make(tmp_path, {**LAST, "far": [0.5, None, 0.6]})
    page = page_of(record, tmp_path)
    assert "With 1 of 3 seeds far or base was not finite" in page
    assert "never with 1 of 3 seeds" in page


@pytest.mark.parametrize("name", ["comparisons", "trials", "arms"])
def test_the_record_is_plain_json(tmp_path, name):
    record = make(tmp_path)
    kept = json.loads(to_json(record))
    assert len(kept[name]) == len(getattr(record, name))
    differences = kept["comparisons"][1]["at_steps"][-1]["by_seed"]
    assert differences == pytest.approx([-0.5, -0.49, -0.5])
