"""All figures of a set and of its parts, and the section that asks for them."""

import pytest
import torch

from tinyflux.errors import ConfigError
from tinyflux.evaluation.classifier import Classifier, ClassifierConfig, save_classifier
from tinyflux.evaluation.config import EvaluateConfig, EvaluationSet
from tinyflux.evaluation.extractors import open_extractor
from tinyflux.evaluation.figures import Pictures, figures, grouped, words_of
from tinyflux.evaluation.neighbours import TrainedOn
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


def test_labels_are_told_beside_chance_the_real_pictures_and_the_nearest_of_training(judge):
    pictures = pictures_of(judge, 10, seeds=2)
    # Features of which an untrained network sees both labels.
    generator = torch.Generator().manual_seed(0)
    pictures.real, pictures.drawn = (
        torch.randn(n, judge.config.width, generator=generator) for n in (10, 20)
    )
    seen = judge.logits(pictures.real)["tone"].argmax(1).tolist()
    pictures.labels = {"tone": [["dark", "light"][index] for index in seen]}
    assert set(pictures.labels["tone"]) == {"dark", "light"}
    pictures.trained = TrainedOn(pictures.real, pictures.labels)
    made = figures(judge, pictures, among=10).figures
    for metric in ("tone_accuracy", "tone_accuracy_among_set", "tone_accuracy_among_trained"):
        assert made[f"real_{metric}"].value == 1.0
        assert made[f"chance_{metric}"].value == 0.5
        assert made[f"chance_{metric}"].note == "one of 2 labels"
    # Every real picture is its own nearest.
    assert made["real_nearest_tone_accuracy"].value == 1.0
    assert made["nearest_tone_accuracy"].count == 20
    assert pictures.part([1, 2]).trained is pictures.trained
    # Of one label that training has, a classifier can choose no other.
    pictures.trained = TrainedOn(pictures.real[:1], {"tone": ["dark"]})
    only = figures(judge, pictures, among=10).figures["tone_accuracy_among_trained"]
    assert (only.value, only.count) == (1.0, 2 * pictures.labels["tone"].count("dark"))
    pictures.trained = TrainedOn(pictures.real[:1], {"tone": ["grey"]})
    none = figures(judge, pictures, among=10).figures
    assert not {"tone_accuracy_among_trained", "nearest_tone_accuracy"} & none.keys()


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
    with pytest.raises(ConfigError, match=r"trained_on needs the columns of labels"):
        EvaluateConfig(trained_on=EvaluationSet("shown", "a"))
    with pytest.raises(ConfigError, match="different names"):
        EvaluateConfig(sets=[EvaluationSet("a", "a"), EvaluationSet("a", "b")])
