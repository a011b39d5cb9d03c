import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import ConfigError
from tinyflux.model.time_shift import shift_at
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.schedules import (
    constant_with_warmup,
    cosine_schedule,
    flux_shift,
    flux_unshift,
    get_lune_weight,
    get_sol_weight,
    linear_decay,
    lr_at,
    sample_timesteps,
    warmup,
    warmup_stable_decay,
)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_unshift_inverts_shift(t, shift):
    t = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(flux_unshift(flux_shift(t, shift), shift), t)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_a_shift_of_the_time_is_the_inverse_shift_of_the_noise_level(u, shift):
    """FLUX shifts the noise level ``1 - t`` by s; of the time t that is a shift by 1/s."""
    u = torch.tensor(u, dtype=torch.float64)
    torch.testing.assert_close(1 - flux_shift(1 - u, shift), flux_shift(u, 1 / shift))


@pytest.mark.parametrize("logit_normal", [True, False])
def test_a_shift_above_one_moves_training_times_away_from_noise(logit_normal):
    noisy = []
    for shift in (1 / 3, 1.0, 3.0):
        source = torch.Generator().manual_seed(0)
        t = sample_timesteps(20_000, "cpu", shift, logit_normal=logit_normal, generator=source)
        noisy.append(float((t < 0.25).float().mean()))
    assert noisy[0] > noisy[1] > noisy[2]
    if logit_normal:  # the defaults
        assert noisy[2] == pytest.approx(0.0140, abs=0.003)


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0.1, 10), st.floats(0.01, 0.99))
def test_larger_pictures_get_more_noise(tokens, more, shift, t):
    time = torch.tensor(t, dtype=torch.float64)
    small = flux_shift(time, shift_at(shift, tokens, 1024))
    large = flux_shift(time, shift_at(shift, tokens + more, 1024))
    assert large < small  # nearer to noise, which is 0


def test_shift_keeps_the_ends_and_the_order():
    t = torch.linspace(0, 1, 50)
    shifted = flux_shift(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()


@pytest.mark.parametrize("logit_normal", [True, False])
def test_timesteps_recover_their_distribution(logit_normal):
    generator = torch.Generator().manual_seed(0)
    t = sample_timesteps(
        20_000, "cpu", logit_normal=logit_normal, logit_mean=0.3, generator=generator
    )
    assert t.shape == (20_000,)
    assert t.min() >= 1e-4
    assert t.max() <= 1 - 1e-4
    plain = flux_unshift(t, 3.0)
    if logit_normal:
        logits = plain.logit()
        assert float(logits.mean()) == pytest.approx(0.3, abs=0.03)
        assert float(logits.std()) == pytest.approx(1.0, abs=0.03)
    else:
        quantiles = plain.quantile(torch.tensor([0.1, 0.5, 0.9]))
        torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.02, rtol=0)


def test_a_generator_fixes_the_timesteps():
    draws = [
        sample_timesteps(4, "cpu", generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_decay])
def test_decays_rise_to_one_and_fall_to_the_floor(schedule):
    values = [schedule(step, 100, 10, 0.1) for step in range(120)]
    assert values[0] == 0
    assert values[10] == 1
    assert values[5] == 0.5
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[100] == pytest.approx(0.1)
    assert values[119] == pytest.approx(0.1)
    assert schedule(0, 100, 0, 0.1) == 1


def test_warmup_stable_decay_stays_and_falls_at_the_end():
    values = [warmup_stable_decay(step, 100, 10, 0.1, 0.2) for step in range(120)]
    assert values[0] == 0
    assert values[5] == 0.5
    assert values[10:81] == [1.0] * 71
    assert all(a > b for a, b in itertools.pairwise(values[80:101]))
    assert values[85] == pytest.approx(1 - 0.9 * 0.5)  # a quarter of the fall, whose root is half
    assert values[100:] == [pytest.approx(0.1)] * 20
    assert warmup_stable_decay(50, 100, 60, 0.1, 0.9) < 1  # the warm-up is never cut
    assert warmup_stable_decay(99, 100, 0, 0.1, 0.0) == 1


@given(st.integers(0, 79), st.integers(100, 10_000))
def test_the_stable_rate_does_not_know_how_long_the_run_is(step, total):
    """So a run may be made longer from any checkpoint before its fall."""
    config = TrainerConfig(lr_scheduler="wsd", warmup_steps=30, total_steps=100)
    longer = TrainerConfig(lr_scheduler="wsd", warmup_steps=30, total_steps=total)
    assert lr_at(longer, step) == lr_at(config, step)


def test_constant_and_warm_up_kinds():
    assert constant_with_warmup(500, 10) == 1
    assert warmup(5, 10, "cosine") == pytest.approx(0.5)
    assert warmup(2, 10, "cosine") < warmup(2, 10, "linear")
    with pytest.raises(ConfigError, match="linear or cosine"):
        warmup(1, 10, "sine")


def test_teacher_weights_warm_up():
    assert get_lune_weight(0, 1000, 0.1) == 0
    assert get_lune_weight(500, 1000, 0.1) == pytest.approx(0.05)
    assert get_sol_weight(9000, 2000, 0.05) == 0.05
    assert get_sol_weight(0, 0, 0.05) == 0.05


def test_learning_rate_moves_from_the_first_step_to_the_floor():
    config = TrainerConfig(learning_rate=1e-3, min_lr=1e-5, total_steps=100, warmup_steps=10)
    rates = [lr_at(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    flat = TrainerConfig(lr_scheduler="constant", warmup_steps=0)
    assert lr_at(flat, 0) == lr_at(flat, 99_999) == flat.learning_rate


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"optimizer": "adamv"}, "did you mean 'adamw'"),
        ({"snr_kind": "velocty"}, "did you mean 'velocity'"),
        ({"lr_scheduler": "cos"}, "choose one of cosine, linear, constant, wsd"),
        ({"lr_decay_ratio": 1.5}, "lr_decay_ratio must be between 0 and 1"),
        ({"text_dropout": 1.5}, "text_dropout must be between 0 and 1"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"dtype": torch.float16}, "float32 or bfloat16"),
        ({"upload_every_steps": 10}, "needs trainer.hf_repo_id"),
        ({"save_every_steps": 0}, "null for never"),
    ],
)
def test_impossible_settings_are_refused(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainerConfig(**setting)


def test_four_times_the_tokens_shift_the_noise_level_by_two():
    t = torch.linspace(0.01, 0.99, 50)
    assert shift_at(3.0, 1024, None) == shift_at(3.0, 1024, 1024) == 3.0
    small = 1 - flux_shift(t, shift_at(3.0, 256, 256))  # noise levels
    large = 1 - flux_shift(t, shift_at(3.0, 1024, 256))
    torch.testing.assert_close(large, 2 * small / (1 + small))
