"""Names of tensors, and whether tensors fit."""

import pytest
import torch
from torch import nn

from tests.fixtures.students import MODEL
from tinyflux.errors import CheckpointError, InputError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.weights import as_module, check_tensors, misfits, plain_name, shapes_of


@pytest.mark.parametrize(
    "name",
    [
        "img_in.weight", "_orig_mod.img_in.weight", "module.img_in.weight",
        "module._orig_mod.img_in.weight", "_orig_mod.module.img_in.weight",
        "img_in._orig_mod.weight", "img_in.module.weight",
    ],
)  # fmt: skip
def test_a_plain_name_has_nothing_that_wrappers_add(name):
    assert plain_name(name) == "img_in.weight"
    assert plain_name(plain_name(name)) == plain_name(name)


def test_the_student_is_found_inside_its_wrappers():
    model = TinyFluxDeep(MODEL)
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    assert as_module(model) is as_module(wrapped) is model
    with pytest.raises(InputError, match="a TinyFluxDeep is needed, not a Linear"):
        as_module(nn.Linear(1, 1))


def test_misfits_are_all_told():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(())}
    assert not misfits(shapes_of(expected), expected)
    check_tensors(expected, expected, "the file")
    given = {"b": torch.zeros(4), "c": torch.zeros(()), "d": torch.zeros(1)}
    problems = misfits(shapes_of(expected), given)
    assert problems.phrases() == ["a is missing", "d is unknown", "b is [4] instead of [3]"]
    assert str(problems) == (
        "1 tensors missing (a); 1 unknown tensors (d); 1 tensors of another shape (b [4] for [3])"
    )
    with pytest.raises(CheckpointError, match="the file does not fit the model: a is missing, d"):
        check_tensors(expected, given, "the file")
