"""The student: its laws, its goldens, its refusals.

Slow: one model is compiled.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures.students import SIZES
from tinyflux.errors import ConfigError, InputError
from tinyflux.model.model import (
    PRESETS,
    UNUSED_PUBLISHED_PREFIXES,
    TinyFluxConfig,
    TinyFluxDeep,
    preset,
)
from tinyflux.model.packing import pack_latents, token_grid, unpack_latents

GOLDENS = Path(__file__).parents[1] / "goldens"


def small(**changes) -> TinyFluxConfig:
    sizes = {**SIZES, "num_double_layers": 2, "num_single_layers": 2, "in_channels": 8}
    return TinyFluxConfig(**{**sizes, **changes})


def randomised(config: TinyFluxConfig) -> TinyFluxDeep:
    """A model whose zero-initialised gates are open, so that every path matters."""
    model = TinyFluxDeep(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(config: TinyFluxConfig, batch: int = 2, h: int = 4, w: int = 4) -> dict:
    return {
        "hidden_states": torch.randn(batch, h * w, config.in_channels),
        "encoder_hidden_states": torch.randn(batch, 5, config.t5_hidden_size),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "timestep": torch.rand(batch),
        "img_ids": TinyFluxDeep.create_img_ids(batch, h, w),
    }


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", ["v42_predicted", "v42_teacher"])
def test_published_layout_gives_the_golden_outputs_and_gradients(name):
    config = TinyFluxConfig.from_dict(json.loads((GOLDENS / f"{name}.config.json").read_text()))
    model = TinyFluxDeep(config).eval()
    tensors = load_file(GOLDENS / f"{name}.model.safetensors")
    model.load_state_dict(
        {k: v for k, v in tensors.items() if not k.startswith(UNUSED_PUBLISHED_PREFIXES)}
    )
    golden = load_file(GOLDENS / f"{name}.io.safetensors")
    given = {k.removeprefix("in."): v for k, v in golden.items() if k.startswith("in.")}
    given["hidden_states"].requires_grad_()
    batch, tokens, _ = given["hidden_states"].shape
    side = int(tokens**0.5)

    velocity, experts = model(
        **given, img_ids=model.create_img_ids(batch, side, side), return_expert_pred=True
    )
    velocity.square().mean().backward()

    assert relative_error(velocity, golden["out.velocity"]) < 2e-5
    gradient = given["hidden_states"].grad
    assert relative_error(gradient, golden["out.grad_hidden_states"]) < 2e-5
    assert experts.keys() == {"lune_pred", "sol_stats_pred", "sol_spatial_pred"}
    for key, prediction in experts.items():
        assert relative_error(prediction, golden[f"out.{key}"]) < 2e-5


def test_the_published_preset_has_the_published_tensors():
    with torch.device("meta"):
        model = TinyFluxDeep(preset("tiny-flux-deep"))
    layout = json.loads((GOLDENS / "published_v42_layout.json").read_text())
    assert TinyFluxConfig.from_dict(layout["config"]) == preset("tiny-flux-deep")
    wanted = {k: v for k, v in layout["tensors"].items() if not k.startswith("rope.")}
    ours = {k: list(v.shape) for k, v in model.state_dict().items()}
    unused = {k: v for k, v in wanted.items() if k.startswith(UNUSED_PUBLISHED_PREFIXES)}
    assert {**ours, **unused} == wanted


def test_the_defaults_are_those_of_the_api_document():
    config = TinyFluxConfig()
    assert (config.hidden_size, config.num_attention_heads, config.attention_head_dim) == (
        1536,
        24,
        64,
    )
    assert (config.t5_layers, config.axes_dims_rope) == ((0, 4, 8, 12), (16, 24, 24))
    assert config.use_cross_attention_sharing


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_its_dictionary(name):
    assert TinyFluxConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (8, 2), (1, 1)])
@pytest.mark.parametrize("lune", [True, False])
@pytest.mark.parametrize("sol", [True, False])
def test_any_grid_with_and_without_each_expert(h, w, lune, sol):
    config = small(use_lune_expert=lune, use_sol_prior=sol)
    velocity, experts = randomised(config)(**inputs(config, h=h, w=w), return_expert_pred=True)
    assert velocity.shape == (2, h * w, 8)
    assert ("lune_pred" in experts, "sol_stats_pred" in experts) == (lune, sol)


def test_a_given_grid_is_the_one_read_from_the_positions():
    config = small()
    model, given = randomised(config), inputs(config, h=3, w=5)
    torch.testing.assert_close(model(**given), model(**given, grid=(3, 5)), rtol=0, atol=0)
    # The same tokens on another grid are another picture.
    other = {**given, "img_ids": model.create_img_ids(2, 5, 3)}
    assert not torch.allclose(model(**given), model(**other), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_agrees_with_fp32(dtype):
    config = small()
    model, given = randomised(config), inputs(config)
    wanted = model(**given)
    found = model.to(dtype)(**given)
    assert found.dtype == dtype
    assert relative_error(found.float(), wanted) < {torch.float32: 1e-6}.get(dtype, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    config = small()
    model, given = randomised(config).train(), inputs(config)
    wanted = model(**given)
    with torch.autocast("cpu", dtype):
        velocity = model(**given)
    assert relative_error(velocity.float(), wanted) < 0.05
    velocity.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_pure_bf16_keeps_neighbouring_times_apart():
    # 0.501 and 0.502 are one number in bf16; the embedding is computed in fp32.
    config = small()
    model, given = randomised(config), inputs(config)
    model.to(torch.bfloat16)
    first = model.time_in(torch.tensor([0.501]))
    second = model.time_in(torch.tensor([0.509]))
    assert not torch.equal(first, second)
    assert model(**given).isfinite().all()


def test_checkpointing_changes_no_gradient():
    config = small()
    plain, recomputed = randomised(config).train(), TinyFluxDeep(config).train()
    recomputed.load_state_dict(plain.state_dict())
    recomputed.enable_gradient_checkpointing()
    given = inputs(config)
    for model in (plain, recomputed):
        model(**given).square().mean().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_frozen_experts_are_not_trainable():
    model = TinyFluxDeep(small(freeze_lune=True, freeze_sol=True))
    trainable = {id(p) for p in model.get_trainable_parameters()}
    frozen = [*model.lune_predictor.parameters(), *model.sol_prior.parameters()]
    assert not trainable & {id(p) for p in frozen}
    assert len(trainable) + len(frozen) == len(list(model.parameters()))


def test_teacher_masks_act_per_sample():
    config = small()
    model, given = randomised(config), inputs(config)
    teacher = {
        "lune_features": torch.randn(2, 20),
        "sol_stats": torch.rand(2, 4),
        "sol_spatial": torch.rand(2, 8, 8),
    }
    mask = torch.tensor([True, False])
    with_teacher, without = model(**given, **teacher), model(**given)
    mixed = model(**given, **teacher, lune_mask=mask, sol_mask=mask)
    torch.testing.assert_close(mixed[0], with_teacher[0])
    torch.testing.assert_close(mixed[1], without[1])
    assert not torch.allclose(with_teacher, without, atol=1e-3)


def test_a_sample_does_not_depend_on_its_batch():
    config = small()
    model, given = randomised(config), inputs(config, batch=3)
    whole = model(**given)
    for row in range(3):
        alone = model(**{key: value[row : row + 1] for key, value in given.items()})
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


def test_shared_text_projection_is_one_module():
    shared = TinyFluxDeep(small(use_cross_attention_sharing=True)).state_dict()
    own = TinyFluxDeep(small(use_cross_attention_sharing=False)).state_dict()
    assert [k for k in shared if "txt_qkv" in k] == ["txt_qkv.weight"]
    assert len([k for k in own if "txt_qkv" in k]) == 2


def test_positions_are_rows_then_columns():
    ids = TinyFluxDeep.create_img_ids(2, 2, 3, "cpu")
    assert ids.shape == (2, 6, 3)
    assert ids[1].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, in its compiler
def test_compiled_model_agrees():
    config = small(num_double_layers=1, num_single_layers=1)
    model, given = randomised(config), inputs(config)
    wanted = model(**given, grid=(4, 4))
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(**given, grid=(4, 4)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5"),
        ({"attention_head_dim": 8}, "hidden_size = 48"),
        ({"axes_dims_rope": (4, 6, 8)}, "axes_dims_rope"),
        ({"axes_dims_rope": (5, 5, 6)}, "even"),
        ({"t5_layers": ()}, "t5_layers"),
        ({"sol_geometric_weight": 1.5}, "sol_geometric_weight"),
        ({"text_padding": "none"}, "text_padding"),
        ({"in_channels": 0}, "in_channels"),
    ],
)
def test_impossible_configs_are_named(changes, names):
    with pytest.raises(ConfigError, match=names):
        small(**changes)


def test_an_unknown_key_suggests_the_right_one():
    with pytest.raises(ConfigError, match=r"'hiden_size' \(did you mean 'hidden_size'\?\)"):
        TinyFluxConfig.from_dict({"hiden_size": 48})


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("hidden_states", (2, 16, 9)),
        ("encoder_hidden_states", (2, 5, 7)),
        ("pooled_projections", (1, 12)),
        ("timestep", (3,)),
    ],
)
def test_wrong_shapes_are_named(key, shape):
    config = small()
    with pytest.raises(InputError, match=key):
        TinyFluxDeep(config)(**{**inputs(config), key: torch.rand(shape)})


def test_tokens_that_do_not_fill_the_grid_are_refused():
    config = small()
    given = inputs(config)
    given["img_ids"] = TinyFluxDeep.create_img_ids(2, 3, 3)
    with pytest.raises(InputError, match="16 image tokens"):
        TinyFluxDeep(config)(**given)


def test_all_zero_text_is_not_nan():
    config = dataclasses.replace(small(), text_padding="zero")
    given = inputs(config)
    given["encoder_hidden_states"].zero_()
    assert randomised(config)(**given).isfinite().all()


TRUNKS = {
    "patch_size": {"patch_size": 2},
    "qk_norm": {"qk_norm": True},
    "gated_single_mlp": {"gated_single_mlp": True},
    "mask_text_padding": {"mask_text_padding": True},
    "time_scale": {"time_scale": 1000.0},
}
TRUNKS["all"] = {name: value for changes in TRUNKS.values() for name, value in changes.items()}


def tokens_of(config: TinyFluxConfig, latents: torch.Tensor, text: torch.Tensor) -> dict:
    patch = config.patch_size
    grid = token_grid(*latents.shape[2:], patch)
    return {
        "hidden_states": pack_latents(latents, patch),
        "encoder_hidden_states": text,
        "pooled_projections": torch.ones(len(latents), config.pooled_projection_dim),
        "timestep": torch.full((len(latents),), 0.3),
        "img_ids": TinyFluxDeep.create_img_ids(len(latents), *grid),
    }


@pytest.mark.parametrize("name", TRUNKS)
def test_each_change_of_the_trunk_changes_what_a_model_computes(name):
    latents, text = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 24)
    text[:, 3:] = 0
    torch.manual_seed(0)
    plain = randomised(small())
    torch.manual_seed(0)
    changed = randomised(small(**TRUNKS[name]))
    found = changed(**tokens_of(changed.config, latents, text))
    assert found.shape == (2, 4 * 6 // changed.config.patch_size**2, changed.config.token_channels)
    unpacked = unpack_latents(found, 4, 6, changed.config.patch_size)
    before = unpack_latents(plain(**tokens_of(plain.config, latents, text)), 4, 6)
    assert (unpacked - before).abs().max() > 1e-4
    found.square().mean().backward()
    # Only what no forward of this kind reads has no gradient.
    assert [key for key, value in changed.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_comes_back_from_its_config(name):
    config = small(**TRUNKS[name])
    assert TinyFluxConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_padding_that_attention_leaves_out_changes_nothing():
    config = small(mask_text_padding=True)
    model, latents, text = randomised(config), torch.randn(2, 8, 4, 4), torch.randn(2, 3, 24)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 9))
    short = model(**tokens_of(config, latents, text))
    assert relative_error(model(**tokens_of(config, latents, padded)), short) < 1e-5
    plain = randomised(small())
    plain.load_state_dict(model.state_dict())
    short = plain(**tokens_of(config, latents, text))
    assert relative_error(plain(**tokens_of(config, latents, padded)), short) > 1e-3


def test_a_caption_of_nothing_but_padding_has_a_finite_velocity():
    config = small(mask_text_padding=True)
    given = tokens_of(config, torch.randn(2, 8, 4, 4), torch.zeros(2, 5, 24))
    assert randomised(config)(**given).isfinite().all()


def test_norms_of_queries_and_keys_bound_attention():
    """Weights a hundred times larger change the directions of queries and keys not at all."""
    torch.manual_seed(0)
    model = randomised(small(qk_norm=True, num_single_layers=0))
    given = tokens_of(model.config, torch.randn(1, 8, 4, 4), torch.randn(1, 5, 24))
    before = model(**given)
    with torch.no_grad():
        for block in model.double_blocks:
            width = model.config.hidden_size
            block.attn.img_qkv.weight[: 2 * width] *= 100
    assert relative_error(model(**given), before) < 1e-3


def test_padding_of_encoders_cannot_be_left_out():
    with pytest.raises(ConfigError, match=r"mask_text_padding needs model.text_padding: zero"):
        small(mask_text_padding=True, text_padding="encoder")
