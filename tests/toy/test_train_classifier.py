"""The classifier that ships, and how it is trained."""

from itertools import islice

import pytest
import torch

from tinyflux.evaluation.classifier import SHIPPED, Classifier, ClassifierConfig, load_classifier
from tinyflux.evaluation.extractors import open_extractor
from tinyflux.evaluation.labels import label_accuracy
from tinyflux.toy.icons import SPLITS, STYLES, Icon, shipped_icons
from tinyflux.toy.train_classifier import (
    BATCH,
    Labelled,
    batches,
    distorted,
    fit,
    is_held_out,
    judge,
    shifted,
)
from tinyflux.util.images import read_picture


def pictures_of(icons):
    return 2 * torch.stack([read_picture(icon.png) for icon in icons]) - 1


def test_the_shipped_classifier_is_as_good_as_it_says_on_what_it_never_saw():
    model, _ = load_classifier(SHIPPED)
    icons = list(shipped_icons())
    assert model.config.labels["thing"] == sorted({icon.thing for icon in icons})
    assert model.config.labels["style"] == [style.name for style in STYLES]
    unseen = [icon for icon in icons if is_held_out(icon)]
    assert {icon.split for icon in unseen} == set(SPLITS)
    assert f"accuracy on {len(unseen)} others" in model.config.description
    features = (extractor := open_extractor("classifier"))(pictures_of(unseen))
    for head, logits in extractor.logits(features).items():
        wanted = [getattr(icon, head) for icon in unseen]
        made = label_accuracy(logits, model.config.labels[head], wanted)
        assert made.value == pytest.approx(model.config.accuracy[head].value, abs=0.01)
    assert (SHIPPED / "model.safetensors").stat().st_size < 3e6


def test_a_tenth_of_the_pictures_is_held_out_by_what_they_show():
    icons = [Icon(f"thing {n}", style.name, "", b"") for n in range(2000) for style in STYLES]
    share = sum(map(is_held_out, icons)) / len(icons)
    assert share == pytest.approx(0.1, abs=0.01)
    assert is_held_out(icons[7]) == is_held_out(Icon(icons[7].thing, icons[7].style, "x", b"y"))


def test_every_picture_is_seen_once_before_any_is_again():
    rows = torch.cat(list(islice(batches(100, torch.Generator().manual_seed(0)), 25)))
    assert len(rows) == 25 * BATCH
    for epoch in rows.split(100):
        assert len(set(epoch.tolist())) == len(epoch)


def test_moved_pictures_are_the_same_but_for_a_pixel_and_white_comes_in():
    random = torch.Generator().manual_seed(0)
    picture = torch.ones(1, 3, 32, 32)
    picture[..., 10, 20] = -1
    moved = shifted(picture.expand(64, -1, -1, -1), random)
    dark = [tuple(row.tolist()) for one in moved for row in (one[0] < -0.99).nonzero()]
    assert len(dark) == 64
    assert set(dark) == {(y, x) for y in (9, 10, 11) for x in (19, 20, 21)}
    torch.testing.assert_close(moved.amax((1, 2, 3)), torch.ones(64))


def test_distorted_pictures_stay_pictures_on_white():
    random = torch.Generator().manual_seed(0)
    white = torch.ones(16, 3, 32, 32)
    may_flip = torch.ones(16, dtype=torch.bool)
    torch.testing.assert_close(distorted(white, may_flip, random), white)
    noise = torch.rand(16, 3, 32, 32, generator=random) * 2 - 1
    seen = distorted(noise, may_flip, random)
    assert seen.shape == noise.shape
    assert seen.abs().max() <= 1
    assert (seen - noise).abs().mean() > 0.1


def test_training_learns_what_pictures_show():
    icons = [icon for icon in shipped_icons() if icon.thing in ("green apple", "tulip")]
    pictures = pictures_of(icons)
    data = Labelled(icons, torch.stack([pictures, pictures]))
    labels = {"thing": ["green apple", "tulip"], "style": [style.name for style in STYLES]}
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(labels, channels=(8, 16), width=16))
    fit(model, data, data, steps=60, seed=0, lr=1e-2)
    reached = judge(model, data)
    assert reached["thing"].value == 1.0
    assert reached["style"].value > 0.5
    assert reached["thing through the VAE"] == reached["thing"]
