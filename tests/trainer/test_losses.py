from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tinyflux.errors import ConfigError, InputError
from tinyflux.model.time_shift import flux_shift
from tinyflux.trainer.losses import (
    compute_lune_loss,
    compute_main_loss,
    compute_sol_loss,
    huber_loss,
    min_snr_weight,
)

GOLDEN = load_file(Path(__file__).parents[1] / "goldens" / "losses.safetensors")


def golden(name):
    return GOLDEN[f"in.{name}"]


def close(found, name):
    torch.testing.assert_close(found, GOLDEN[f"out.{name}"], rtol=1e-6, atol=1e-6)


def test_goldens_hold():
    pred, target, t = golden("pred"), golden("target"), golden("t")
    close(min_snr_weight(t), "min_snr")
    close(flux_shift(t, 3.0), "flux_shift3")
    close(compute_main_loss(pred, target, use_huber=False), "main_mse")
    close(compute_main_loss(pred, target), "main_huber")
    everything = compute_main_loss(
        pred,
        target,
        mask=golden("mask"),
        spatial_weights=golden("spatial"),
        snr_weights=min_snr_weight(t),
    )
    close(everything, "main_all")
    for mode in ("cosine", "mse", "huber"):
        close(compute_lune_loss(golden("lp"), golden("lt"), mode), f"lune_{mode}")
    close(compute_sol_loss(golden("ss"), golden("sp"), golden("st"), golden("spatial")), "sol")


@given(st.floats(-3, 3), st.floats(0.01, 1))
def test_huber_is_quadratic_then_linear(difference, delta):
    found = huber_loss(torch.tensor(difference), torch.tensor(0.0), delta)
    size = abs(difference)
    expected = 0.5 * size**2 if size <= delta else delta * (size - 0.5 * delta)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_min_snr_is_one_near_noise_and_finite_everywhere():
    t = torch.tensor([0.0, 1e-4, 0.5, 0.9, 1 - 1e-4, 1.0])
    weights = min_snr_weight(t)
    assert weights.isfinite().all()
    assert (weights[:3] == 1).all()
    assert (weights.diff() <= 0).all()


@given(st.floats(0.01, 0.99), st.floats(0.1, 20))
def test_each_min_snr_weight_is_the_same_weight_on_the_data(t, gamma):
    """Min-SNR weighs the error of the data by ``min(snr, gamma)``, whatever is predicted.

    With ``x = (1 - t) * noise + t * data``, an error e of the velocity is one of ``(1 - t) * e`` of
    the data and one of ``t * e`` of the noise.
    """
    time, error = torch.tensor([t], dtype=torch.float64), 0.7
    wanted = min((t / (1 - t)) ** 2, gamma) * ((1 - t) * error) ** 2
    velocity = min_snr_weight(time, gamma, kind="velocity").double() * error**2
    epsilon = min_snr_weight(time, gamma).double() * (t * error) ** 2
    assert float(velocity) == pytest.approx(wanted, rel=1e-4)
    assert float(epsilon) == pytest.approx(wanted, rel=1e-4)


def test_the_velocitys_min_snr_weight_is_largest_where_snr_is_gamma():
    t = torch.linspace(0, 1, 2001)
    weights = min_snr_weight(t, 4.0, kind="velocity")
    assert weights.isfinite().all()
    assert float(t[weights.argmax()]) == pytest.approx(2 / 3, abs=1e-3)  # t / (1 - t) = 2
    assert weights[0] == weights[-1] == 0
    with pytest.raises(ConfigError, match="epsilon, velocity"):
        min_snr_weight(t, kind="v")


def test_huber_learns_the_median_where_the_flow_needs_the_mean():
    """Targets of one input: 0 three times, 4 once. A small delta finds 0, MSE finds 1."""
    target = torch.tensor([0.0, 0.0, 0.0, 4.0]).reshape(1, 4, 1)
    guesses = torch.linspace(-1, 4, 501)

    def best(**options):
        losses = [compute_main_loss(g.expand(1, 4, 1), target, **options) for g in guesses]
        return float(guesses[torch.stack(losses).argmin()])

    assert best(use_huber=True, huber_delta=0.1) == pytest.approx(0, abs=0.05)
    assert best(use_huber=False) == pytest.approx(1, abs=0.02)


def test_an_even_spatial_map_changes_nothing():
    pred, target = golden("pred"), golden("target")
    plain = compute_main_loss(pred, target)
    for level in (0.0, 0.1, 7.0):
        even = compute_main_loss(pred, target, spatial_weights=torch.full((3, 8, 8), level))
        torch.testing.assert_close(even, plain)


def test_rectangles_take_their_grid():
    pred, target = torch.randn(2, 12, 4), torch.randn(2, 12, 4)
    weights = torch.zeros(2, 8, 8)
    weights[:, :, :4] = 1.0  # the left half
    found = compute_main_loss(pred, target, spatial_weights=weights, use_huber=False, grid=(3, 4))
    columns = (pred - target).square().mean(-1).unflatten(1, (3, 4))
    torch.testing.assert_close(found, 2 * columns[:, :, :2].sum() / 24)
    with pytest.raises(InputError, match="12 tokens"):
        compute_main_loss(pred, target, spatial_weights=weights)


@pytest.mark.parametrize("mode", ["cosine", "mse", "huber"])
def test_losses_of_micro_batches_average_to_that_of_the_batch(mode):
    pred, target = golden("lp").repeat(4, 1), golden("lt").repeat(4, 1)
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    whole = compute_lune_loss(pred, target, mode, mask)
    parts = [compute_lune_loss(pred[i::4], target[i::4], mode, mask[i::4]) for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_no_teacher_at_all_is_a_loss_of_zero_with_a_gradient():
    pred = golden("ss").clone().requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    nan = torch.full((3, 4), float("nan"))
    loss = compute_sol_loss(pred, golden("sp"), nan, golden("spatial"), none)
    assert float(loss.detach()) == 0
    lune = compute_lune_loss(golden("lp"), golden("lt"), mask=none)
    assert float(lune) == 0


def test_unknown_lune_mode_is_refused():
    with pytest.raises(ConfigError, match="cosine, mse, huber"):
        compute_lune_loss(golden("lp"), golden("lt"), "cosin")
