from dataclasses import replace

import pytest
import torch

from tests.fixtures.students import MODEL
from tinyflux.errors import CheckpointError, ConfigError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.optimizers import is_block_matrix

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


def with_gradients(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return engine


def test_muon_turns_the_matrices_of_blocks_and_leaves_the_rest_to_adamw():
    engine = engine_of(optimizer="muon", decay_matrices_only=True)
    plain = engine_of(decay_matrices_only=True)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    for each in (engine, plain):
        with_gradients(each, 1).step(1e-3)
    adamw = dict(plain.model.named_parameters())
    turned = set()
    for name, parameter in engine.model.named_parameters():
        if is_block_matrix(name, parameter.shape):
            turned.add(name)
            step = (parameter - before[name] * (1 - 1e-3 * 0.5)).detach()
            size = 1e-3 * 0.2 * max(parameter.shape) ** 0.5  # as large as AdamW's
            values = torch.linalg.svdvals(step) / size
            assert 0.6 < values.median() < 1.2, name  # but for the gradient's own zeros
            assert values.max() < 1.4, name
        else:
            torch.testing.assert_close(parameter, adamw[name], rtol=0, atol=0, msg=name)
    assert "single_blocks.0.mlp.fc1.weight" in turned
    assert "double_blocks.0.img_norm1.linear.weight" in turned
    assert {"img_in.weight", "final_linear.weight", "txt_qkv.weight"}.isdisjoint(turned)


def test_muon_goes_on_from_its_state_bit_for_bit():
    straight = engine_of(optimizer="muon")
    for seed in range(4):
        with_gradients(straight, seed).step(1e-3)
    first, second = engine_of(optimizer="muon"), engine_of(optimizer="muon")
    for seed in range(2):
        with_gradients(first, seed).step(1e-3)
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer_state(first.optimizer_state())
    for seed in range(2, 4):
        with_gradients(second, seed).step(1e-3)
    expected = straight.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    kept = second.optimizer_state()
    assert "single_blocks.0.mlp.fc1.weight/momentum_buffer" in kept
    assert "single_blocks.0.mlp.fc1.weight/exp_avg" not in kept
    assert "img_in.weight/exp_avg_sq" in kept


def test_muon_and_adamw_do_not_take_each_others_state():
    muon, adamw = engine_of(optimizer="muon"), engine_of()
    for engine in (muon, adamw):
        with_gradients(engine, 1).step(1e-3)
    for one, other in ((muon, adamw), (adamw, muon)):
        with pytest.raises(CheckpointError, match=r"the trainer\.optimizer that it was made with"):
            one.load_optimizer_state(other.optimizer_state())


def test_muon_skips_a_step_that_is_not_finite():
    engine = with_gradients(engine_of(optimizer="muon"), 1)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    engine.model.img_in.weight.grad[0, 0] = float("nan")
    engine.step(1e-3)
    assert engine.skips.read() == (1, 1)
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


def test_muon_without_matrices_in_blocks_is_refused():
    torch.manual_seed(0)
    model = TinyFluxDeep(replace(MODEL, num_double_layers=0, num_single_layers=0))
    with pytest.raises(ConfigError, match="'muon' needs trainable matrices in blocks"):
        TorchEngine(model, replace(CONFIG, optimizer="muon"))
