from dataclasses import replace

import pytest
import torch

from tests.fixtures.students import MODEL
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import TorchEngine

CONFIG = TrainerConfig(learning_rate=0.1, weight_decay=0.5, dtype=torch.float32)


def engine_of(**changes):
    torch.manual_seed(0)
    model = TinyFluxDeep(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    return TorchEngine(model, replace(CONFIG, **changes))


def step_without_gradient(engine):
    """How each parameter changed by decay alone, as a factor."""
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(engine._config.learning_rate)
    return {
        name: (p.detach() / before[name]).flatten() for name, p in engine.model.named_parameters()
    }


def test_matrices_alone_decay_if_told_so():
    engine = engine_of(decay_matrices_only=True)
    factors = step_without_gradient(engine)
    shapes = {name: p.ndim for name, p in engine.model.named_parameters()}
    for name, factor in factors.items():
        expected = 0.95 if shapes[name] == 2 else 1.0
        torch.testing.assert_close(factor, torch.full_like(factor, expected), msg=name)
    spared = {name for name, ndim in shapes.items() if ndim != 2}
    assert {
        "img_in.bias",
        "final_norm.weight",
        "text_balance",
        "sol_prior.blend_gate",
        "single_blocks.0.attn.spatial_to_mod.weight",  # [heads, 1, 1, 1]: a scale per head
    } <= spared
    assert "single_blocks.0.mlp.fc1.weight" not in spared


def test_everything_decays_by_default():
    for name, factor in step_without_gradient(engine_of()).items():
        torch.testing.assert_close(factor, torch.full_like(factor, 0.95), msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("before", [False, True])
def test_the_optimizers_state_belongs_to_names_and_not_to_groups(optimizer, before):
    """A run may begin to spare the others, or cease to, where it stands."""
    first = engine_of(optimizer=optimizer, decay_matrices_only=before)
    for parameter in first.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    first.step(1e-3)
    second = engine_of(optimizer=optimizer, decay_matrices_only=not before)
    second.load_optimizer_state(first.optimizer_state())
    expected, state = first.optimizer_state(), second.optimizer_state()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
