"""The classifier of labels, and what is made of its logits."""

import pytest
import torch

from tinyflux.errors import HubError, InputError
from tinyflux.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    load_classifier,
    save_classifier,
)
from tinyflux.evaluation.extractors import open_extractor
from tinyflux.evaluation.labels import label_accuracy

LABELS = {"colour": ["red", "green", "blue"], "size": ["small", "large"]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(LABELS, side=16, channels=(4, 8), width=12)).eval()


def test_a_classifier_comes_back_from_disk_in_half_precision(model, tmp_path):
    save_classifier(model, tmp_path)
    again, _ = load_classifier(tmp_path)
    assert again.config == model.config
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    for name, logits in model(pictures).items():
        assert logits.shape == (5, len(LABELS[name]))
        torch.testing.assert_close(again(pictures)[name], logits, atol=1e-2, rtol=1e-2)


def test_it_is_an_extractor_whose_features_give_its_logits(model, tmp_path):
    save_classifier(model, tmp_path)
    extractor = open_extractor(f"classifier:{tmp_path}")
    pictures = torch.rand(4, 3, 40, 24) * 2 - 1
    features = extractor(pictures)
    again, _ = load_classifier(tmp_path)
    for name, logits in extractor.logits(features).items():
        torch.testing.assert_close(logits, again(pictures)[name])
    assert features.shape == (4, 12)
    with torch.no_grad():
        model.heads["size"].bias[0] += 1
    save_classifier(model, tmp_path)
    assert open_extractor(f"classifier:{tmp_path}").fingerprint != extractor.fingerprint


def test_what_is_no_classifier_is_one_sentence(model, tmp_path):
    with pytest.raises(HubError, match="no classifier can be opened"):
        open_extractor(f"classifier:{tmp_path}")
    save_classifier(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(HubError, match="no classifier can be opened"):
        open_extractor(f"classifier:{tmp_path}")


def test_accuracy_counts_the_most_likely_label():
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [2, 1, 3]])
    wanted = ["red", "green", "blue", "red"]
    assert label_accuracy(logits, LABELS["colour"], wanted).value == 0.5
    # Of red and green alone the last one is red.
    some = label_accuracy(logits[[0, 1, 3]], LABELS["colour"], ["red", "green", "red"],
                          among=["red", "green"])  # fmt: skip
    assert some.value == pytest.approx(2 / 3)
    assert some.note == "chosen among 2 labels"


def test_labels_that_the_classifier_does_not_know_are_left_out_and_told():
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1]])
    made = label_accuracy(logits, LABELS["colour"], ["red", "pink"])
    assert (made.value, made.count) == (1.0, 1)
    assert "1 pictures have a label that the classifier does not know" in made.note
    some = label_accuracy(logits, LABELS["colour"], ["red", "blue"], among=["red", "green"])
    assert some.note == "chosen among 2 labels; 1 pictures have a label that is none of them"
    with pytest.raises(InputError, match="none of the wanted labels"):
        label_accuracy(logits, LABELS["colour"], ["pink", "pink"])
    with pytest.raises(InputError, match="do not fit"):
        label_accuracy(logits, LABELS["colour"], ["red"])
