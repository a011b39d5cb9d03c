import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyflux.model.attention_stats import watched_attention
from tinyflux.model.teachers import lune_features, sol_features

GOLDENS = Path(__file__).parents[1] / "goldens"


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


def modules_run(unet, work):
    """Names of the modules without children whose forward began, in order."""
    names = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in unet.named_modules()
        if not list(module.children())
    ]
    work()
    for hook in hooks:
        hook.remove()
    return names


def test_lune_runs_nothing_after_the_mid_block(unet, golden):
    names = modules_run(unet, lambda: lune_features(unet, *given(golden)))
    assert names[-1].startswith("mid_block.")
    assert not any(name.startswith(("up_blocks.", "conv_norm_out", "conv_out")) for name in names)


def test_sol_runs_nothing_after_the_last_layers_queries_and_keys(unet, golden):
    names = modules_run(unet, lambda: sol_features(unet, *given(golden)))
    last = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    last = max(last, key=lambda name: max(i for i, n in enumerate(names) if n.startswith(name)))
    assert last.startswith("up_blocks.")
    assert names[-2:] == [f"{last}.to_q", f"{last}.to_k"]
    assert f"{last}.to_v" not in names


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


def naive(q, k, v, scale, grid):
    """Output, statistics and attention received by definition, from whole matrices in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    heads = torch.softmax(scale * q @ k.mT, dim=-1)
    mean, tokens = heads.mean(1), math.prod(grid)
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    distance = torch.cdist(places, places).to(q.device)
    locality = 1 - (mean * distance).sum(-1) / distance.max()
    entropy = torch.special.entr(mean).sum(-1) / math.log(tokens)
    ratio = mean.norm(p=1, dim=-1) / mean.norm(p=2, dim=-1)
    sparsity = (math.sqrt(tokens) - ratio) / (math.sqrt(tokens) - 1)
    stats = torch.stack([locality, entropy, 1 - entropy, sparsity], dim=-1).mean(1)
    return heads @ v, stats, mean.sum(1)


def attention_inputs(grid, sharpness=1.0, batch=3, **kind):
    """Queries, keys and values of two heads of width 5; sharper rows are nearer to one-hot."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, 2, math.prod(grid), 5, generator=generator)
    return (q * sharpness).to(**kind), k.to(**kind), v.to(**kind)


@pytest.mark.parametrize("query_chunk", [None, 1, 7, 100])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (12, 3), (1, 6), (2, 1)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 100.0])
def test_watched_attention_is_the_naive_one(grid, sharpness, query_chunk):
    q, k, v = attention_inputs(grid, sharpness)
    output, stats, received = watched_attention(q, k, v, 5**-0.5, grid, query_chunk)
    wanted_output, wanted_stats, wanted_received = naive(q, k, v, 5**-0.5, grid)
    torch.testing.assert_close(stats.double(), wanted_stats, rtol=0, atol=1e-6)
    torch.testing.assert_close(received.double(), wanted_received, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.double(), wanted_output, rtol=1e-4, atol=1e-5)


def test_a_single_token_is_local_and_sparse():
    q, k, v = attention_inputs((1, 1))
    output, stats, _ = watched_attention(q, k, v, 1.0, (1, 1))
    assert stats.tolist() == [[1, 0, 1, 1]] * 3
    torch.testing.assert_close(output, v)


def test_without_values_there_are_the_same_statistics():
    q, k, v = attention_inputs((5, 7))
    output, stats, received = watched_attention(q, k, None, 1.0, (5, 7))
    assert output is None
    assert torch.equal(stats, watched_attention(q, k, v, 1.0, (5, 7)).stats)
    assert torch.equal(received, watched_attention(q, k, v, 1.0, (5, 7)).received)


def test_no_matrix_of_all_tokens_exists():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
            return result

    grid = (32, 32)
    q, k, v = attention_inputs(grid)
    with Largest() as largest:
        watched_attention(q, k, v, 1.0, grid, query_chunk=8)
    assert 4 * 2 * 8 * 1024 <= largest.bytes < 4 * 1024**2 / 8


def test_bf16_attention_gives_fp32_statistics():
    q, k, v = attention_inputs((8, 8), dtype=torch.bfloat16)
    output, stats, received = watched_attention(q, k, v, 5**-0.5, (8, 8))
    wanted_output, wanted_stats, wanted_received = naive(q, k, v, 5**-0.5, (8, 8))
    assert (output.dtype, stats.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(stats.double(), wanted_stats, rtol=0, atol=2e-3)
    torch.testing.assert_close(received.double(), wanted_received, rtol=2e-2, atol=0)
    torch.testing.assert_close(output.double(), wanted_output, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize("query_chunk", [None, 7])
def test_watched_attention_on_a_gpu_is_the_naive_one_and_never_waits(dtype, error, query_chunk):
    grid = (16, 12)
    q, k, v = attention_inputs(grid, device="cuda", dtype=dtype)
    wanted_output, wanted_stats, wanted_received = naive(q, k, v, 5**-0.5, grid)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, stats, received = watched_attention(q, k, v, 5**-0.5, grid, query_chunk)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(stats.double(), wanted_stats, rtol=0, atol=error)
    torch.testing.assert_close(received.double(), wanted_received, rtol=10 * error, atol=0)
    torch.testing.assert_close(output.double(), wanted_output, rtol=10 * error, atol=10 * error)
