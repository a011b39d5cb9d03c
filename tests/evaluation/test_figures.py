"""All figures of a set and of its parts, and the section that asks for them."""

import pytest
import torch

from tinyflux.errors import ConfigError
from tinyflux.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from tinyflux.evaluation.config import EvaluateConfig, EvaluationSet
from tinyflux.evaluation.extractors import open_extractor
from tinyflux.evaluation.figures import Pictures, figures, grouped, words_of
from tinyflux.evaluation.record import Measured, SetFigures
from tinyflux.util.config import from_dict, to_dict


@pytest.fixture
def judge(tmp_path):
    """An untrained classifier of two labels."""
    model = Classifier(ClassifierConfig({"tone": ["dark", "light"]}, side=8, channels=(4,)))
    save_classifier(model, tmp_path)
    return open_extractor(f"classifier:{tmp_path}")


def pictures_of(judge, count, seeds):
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    drawn = torch.rand(count * seeds, 3, 8, 8, generator=generator) * 2 - 1
    features = judge(real)
    seen = judge.logits(features)["tone"].argmax(1).tolist()
    return Pictures(
        features,
        judge(drawn),
        ["one two" if index % 2 else "one two three four" for index in range(count)],
        {"tone": [["dark", "light"][index] for index in seen]},
    )


def test_every_metric_that_an_extractor_allows(judge):
    made = figures(judge, pictures_of(judge, 10, seeds=2), among=10)
    assert {"kid", "fid", "precision", "recall", "density", "coverage"} <= set(made.figures)
    # Its own answers are what is wanted of it.
    assert made.figures["real_tone_accuracy"].value == 1.0
    assert made.figures["tone_accuracy"].count == 20
    assert "kid" not in figures(judge, pictures_of(judge, 5, seeds=1), among=10).figures


def test_a_part_has_its_own_drawn_pictures(judge):
    whole = pictures_of(judge, 10, seeds=2)
    part = whole.part([3, 7])
    assert part.seeds == 2
    torch.testing.assert_close(part.drawn, whole.drawn[[3, 7, 13, 17]])
    assert part.labels["tone"] == [whole.labels["tone"][3], whole.labels["tone"][7]]


def test_groups_are_of_columns_and_of_words_and_small_ones_are_left_out(judge):
    whole = pictures_of(judge, 14, seeds=1)
    colours = ["red"] * 8 + ["blue"] * 6
    made = grouped([judge], [whole], {"colour": colours, "size": ["8x8"] * 14}, 7, among=10)
    assert [(group.by, group.value, group.count) for group in made] == [
        ("colour", "red", 8),
        ("caption words", "1 to 3", 7),
        ("caption words", "4 to 7", 7),
    ]
    assert made[0].spaces[0].figures["kid"].count == 8


@pytest.mark.parametrize(
    ("caption", "words"),
    [("", "1 to 3"), ("a b c", "1 to 3"), ("a b c d", "4 to 7"), ("a " * 99, "16 or more")],
)
def test_captions_are_divided_by_their_words(caption, words):
    assert words_of(caption) == words


def test_a_record_comes_back_from_json(judge):
    space = figures(judge, pictures_of(judge, 10, seeds=1), among=10)
    record = Measured("abc", 4, 2.0, 1, [SetFigures("pairs", 10, 10, [space])])
    assert from_dict(Measured, to_dict(record), "the record") == record


def test_a_section_that_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="at least 2, not 1"):
        EvaluateConfig(retrieval_among=1)
    with pytest.raises(ConfigError, match="'held' is unknown"):
        EvaluateConfig(cache_sets=["held"])
    with pytest.raises(ConfigError, match="name of a part of the cache"):
        EvaluationSet("train", "a.parquet")
    with pytest.raises(ConfigError, match="needs a name and a file"):
        EvaluationSet("pairs", "")
    with pytest.raises(ConfigError, match="different names"):
        EvaluateConfig(sets=[EvaluationSet("a", "a"), EvaluationSet("a", "b")])
