"""Labels of the training pictures that are nearest to others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import InputError
from tinyflux.evaluation.neighbours import TrainedOn, nearest_label_accuracy, nearest_rows


@given(count=st.integers(1, 6), others=st.integers(1, 6), seed=st.integers(0, 99))
def test_nothing_is_nearer_than_the_nearest(count, others, seed):
    random = torch.Generator().manual_seed(seed)
    features, trained = (torch.randn(n, 3, generator=random) for n in (count, others))
    found = (features - trained[nearest_rows(features, trained)]).norm(dim=1)
    assert (found[:, None] <= torch.cdist(features, trained) + 1e-5).all()


def test_many_rows_are_searched_a_block_at_a_time():
    features = torch.arange(2500.0)[:, None]
    assert nearest_rows(features, features).tolist() == list(range(2500))


def test_a_picture_has_the_labels_of_its_nearest_in_training():
    trained = TrainedOn(
        torch.tensor([[0.0, 0], [10, 0]]), {"thing": ["apple", "pear"], "style": ["flat", "flat"]}
    )
    drawn = torch.tensor([[1.0, 0], [9, 0], [2, 0], [8, 0]])
    wanted = {
        "thing": ["apple", "pear", "pear", "plum"],
        "style": ["flat", "flat", "round", "round"],
        "size": ["small"] * 4,
    }
    made = nearest_label_accuracy(drawn, trained, wanted)
    assert list(made) == ["thing", "style"]
    # The plum is no training picture's.
    assert (made["thing"].value, made["thing"].count) == (pytest.approx(2 / 3), 3)
    assert made["thing"].note == "1 pictures have a label that no training picture has"
    assert (made["style"].value, made["style"].count) == (1.0, 2)
    assert nearest_label_accuracy(drawn, trained, {"thing": ["plum"] * 4}) == {}


def test_features_of_two_extractors_cannot_be_compared():
    with pytest.raises(InputError, match="cannot be compared"):
        nearest_rows(torch.zeros(2, 3), torch.zeros(2, 4))
