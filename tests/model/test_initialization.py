"""First weights by name: nothing that is random depends on what else was built."""

import pytest
import torch
from torch import nn

from tests.fixtures.worlds import student_config
from tinyflux.model.initialization import draw_by_name
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.presets import preset


def drawn(config, seed=5, before=0):
    """A student's first weights, after other draws from the global generator."""
    torch.manual_seed(before)
    model = TinyFluxDeep(config)
    draw_by_name(model, seed)
    return model.state_dict()


@pytest.mark.parametrize("config", [preset("toy"), student_config(sol_standardize=True)])
def test_all_that_is_random_follows_from_the_seed_and_the_name(config):
    first, second, other = drawn(config), drawn(config, before=1), drawn(config, seed=6)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    random = [name for name in first if not torch.equal(first[name], other[name])]
    assert all(name.endswith(".weight") for name in random)
    assert any(name.startswith("double_blocks.0.") for name in random)


def test_a_module_more_changes_no_other_module():
    full = drawn(student_config())
    without = drawn(student_config(use_lune_expert=False, use_sol_prior=False, use_t5_vec=False))
    assert without.keys() < full.keys()
    assert all(torch.equal(without[name], full[name]) for name in without)


def test_the_distribution_stays_and_zeros_stay_zeros():
    model = TinyFluxDeep(student_config())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    draw_by_name(model, 0)
    for name, weight in model.named_parameters():
        assert weight.any() == before[name].any(), name
    layer = nn.Sequential(nn.Linear(200, 300))
    draw_by_name(layer, 0)
    bound = (6 / 500) ** 0.5
    assert layer[0].weight.abs().max() <= bound
    assert layer[0].weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
