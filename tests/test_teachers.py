from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tinyflux.model.teachers import lune_features, sol_features

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(GOLDENS / "teacher_unet").eval()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDENS / "teacher_unet.io.safetensors")


def given(golden):
    return (
        golden["in.latents"],
        golden["in.timestep_fraction"],
        golden["in.encoder_hidden_states"],
    )


def relative_error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_lune_is_the_golden_mid_block_mean(unet, golden):
    assert relative_error(lune_features(unet, *given(golden)), golden["out.mid_pooled"]) < 1e-5


@pytest.mark.parametrize("query_chunk", [None, 1, 7])
def test_sol_gives_the_golden_statistics_and_map(unet, golden, query_chunk):
    stats, spatial = sol_features(unet, *given(golden), query_chunk=query_chunk)
    assert relative_error(stats[:, :3], golden["out.sol_stats3"]) < 1e-5
    assert relative_error(spatial, golden["out.sol_spatial"]) < 1e-5
    torch.testing.assert_close(spatial.sum((1, 2)), torch.ones(2))


def test_lune_runs_nothing_after_the_mid_block(unet, golden):
    ran = []
    hook = unet.up_blocks[0].register_forward_hook(lambda *_: ran.append(True))
    lune_features(unet, *given(golden))
    hook.remove()
    assert not ran


def test_watching_leaves_the_unet_as_it_was(unet, golden):
    latents, sigma, text = given(golden)
    before = unet.attn_processors
    velocity = unet(latents, 1000 * sigma, text).sample
    sol_features(unet, latents, sigma, text)
    with pytest.raises(RuntimeError):
        sol_features(unet, latents, sigma, text[..., :5])
    assert unet.attn_processors == before
    torch.testing.assert_close(unet(latents, 1000 * sigma, text).sample, velocity)
    assert relative_error(velocity, golden["out.velocity"]) < 1e-5


def test_watched_attention_computes_the_same_attention(unet, golden):
    # The statistics of later layers depend on the outputs of earlier ones; so does the mid block.
    latents, sigma, text = given(golden)
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda m, i, o: seen.append(o.mean((2, 3))))
    sol_features(unet, latents, sigma, text)
    hook.remove()
    torch.testing.assert_close(seen[0], golden["out.mid_pooled"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 8), (8, 24), (5, 7)])
def test_any_grid_and_each_sample_alone(unet, height, width):
    latents, sigma = torch.randn(3, 4, height, width), torch.rand(3)
    text = torch.randn(3, 9, 32)
    if height % 2:  # this UNet halves once, and its up path wants even sides
        torch.testing.assert_close(
            lune_features(unet, latents, sigma, text)[1:2],
            lune_features(unet, latents[1:2], sigma[1:2], text[1:2]),
            rtol=1e-4,
            atol=1e-5,
        )
        return
    stats, spatial = sol_features(unet, latents, sigma, text)
    alone = sol_features(unet, latents[1:2], sigma[1:2], text[1:2])
    torch.testing.assert_close(stats[1:2], alone.stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spatial[1:2], alone.spatial, rtol=1e-4, atol=1e-6)
    assert stats.min() >= 0
    assert stats.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_teachers_give_fp32_statistics(unet, golden, dtype):
    latents, sigma, text = given(golden)
    half = UNet2DConditionModel.from_pretrained(GOLDENS / "teacher_unet", torch_dtype=dtype).eval()
    stats, _ = sol_features(half, latents, sigma, text)
    assert stats.dtype == torch.float32
    assert relative_error(stats[:, :3], golden["out.sol_stats3"]) < 0.05
