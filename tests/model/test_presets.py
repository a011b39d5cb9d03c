"""The presets for new students: sizes, shapes, and that their kind of student trains."""

from dataclasses import replace

import pytest
import torch

from tests.fixtures.students import SIZES, make_batch
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.packing import token_grid
from tinyflux.model.presets import preset
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.dropout import install
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.step import training_loss
from tinyflux.util.buckets import default_buckets

MILLIONS = {"s": 99.7, "b": 248.6, "l": 596.2}
SMALL = {**SIZES, "num_single_layers": 2}


@pytest.mark.parametrize("name", MILLIONS)
def test_a_preset_has_its_parameters(name):
    with torch.device("meta"):
        model = TinyFluxDeep(preset(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == MILLIONS[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_a_preset_is_cheap_where_it_should_be_and_twice_as_deep_in_single_blocks(name):
    config = preset(name)
    assert config.attention_head_dim in (64, 128)
    assert 2 <= config.num_single_layers / config.num_double_layers <= 2.5
    assert (config.patch_size, config.time_scale) == (2, 1000.0)
    assert config.qk_norm
    assert config.gated_single_mlp
    assert config.mask_text_padding
    assert config.sol_standardize


@pytest.mark.parametrize("name", MILLIONS)
def test_a_picture_is_as_many_tokens_as_in_flux(name):
    config = replace(preset(name), num_double_layers=1, num_single_layers=1)
    with torch.device("meta"):
        model = TinyFluxDeep(config)
        for pixels, tokens in ((256, 256), (512, 1024)):
            grid = token_grid(pixels // 8, pixels // 8, config.patch_size)
            velocity = model(
                torch.zeros(2, tokens, 64),
                torch.zeros(2, config.max_text_length, config.t5_hidden_size),
                torch.zeros(2, config.pooled_projection_dim),
                torch.zeros(2),
                TinyFluxDeep.create_img_ids(2, *grid),
                grid=grid,
            )
            assert velocity.shape == (2, tokens, 64)


@pytest.mark.parametrize("name", MILLIONS)
def test_steps_of_a_small_student_of_the_kind_lower_its_loss(name):
    torch.manual_seed(0)
    model = TinyFluxDeep(replace(preset(name), **SMALL)).train()
    install(model)
    trainer = TrainerConfig(learning_rate=3e-3, dtype=torch.float32, use_huber_loss=False)
    engine, batch, losses = TorchEngine(model, trainer), make_batch(), []
    for _ in range(12):  # the same draws each time, which can be learnt
        loss = training_loss(model, batch, trainer, 0, None, default_buckets(), engine.forward)
        engine.backward(loss.total, last=True)
        engine.step(trainer.learning_rate)
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert engine.skips.read() == (0, 0)
