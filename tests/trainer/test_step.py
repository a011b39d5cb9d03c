import itertools
from dataclasses import replace

import pytest
import torch

from tests.fixtures.students import make_batch, student
from tinyflux.data.batches import HeldOut, TrainBatch
from tinyflux.errors import InputError
from tinyflux.model.packing import pack_latents, unpack_latents
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.draws import Draws
from tinyflux.trainer.step import training_loss
from tinyflux.trainer.validation import validate
from tinyflux.util.buckets import default_buckets

CONFIG = TrainerConfig(
    lune_warmup_steps=0,
    sol_warmup_steps=0,
    text_dropout=0.3,
    lune_dropout=0.3,
    sol_dropout=0.3,
    lune_mode="mse",
    use_spatial_weighting=True,
    dtype=torch.float32,
)


def loss_and_gradient(model, batches, config=CONFIG):
    """The mean over ``batches`` weighed by their sizes, as the loop does."""
    model.zero_grad()
    size = sum(len(batch) for batch in batches)
    sums = torch.zeros(4)
    null = (torch.randn(5, 24, generator=torch.Generator().manual_seed(2)), torch.ones(12))
    for batch in batches:
        loss = training_loss(model, batch, config, 10, null, default_buckets())
        (loss.total * len(batch) / size).backward()
        sums += loss.stack() * len(batch) / size
    return sums, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("cuts", [[6], [3, 6, 9], [1, 5, 11]])
def test_micro_batches_give_the_loss_and_gradient_of_the_batch(cuts):
    model, batch = student(), make_batch()
    whole, gradient = loss_and_gradient(model, [batch])
    edges = [0, *cuts, len(batch)]
    parts = [batch[a:b] for a, b in itertools.pairwise(edges)]
    cut, cut_gradient = loss_and_gradient(model, parts)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_the_order_within_a_batch_does_not_matter():
    model, batch = student(), make_batch()
    order = torch.randperm(len(batch))
    shuffled = TrainBatch(**{k: v[order] for k, v in vars(batch).items()})
    first, _ = loss_and_gradient(model, [batch])
    second, _ = loss_and_gradient(model, [shuffled])
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_global_randomness_is_neither_used_nor_changed():
    model, batch = student(), make_batch()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = loss_and_gradient(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second, _ = loss_and_gradient(model, [batch])
    assert torch.equal(first, second)


def test_draws_depend_on_seed_and_position_only():
    together = Draws.at(0, torch.tensor([3, 8]), (4, 2, 2))
    alone = Draws.at(0, torch.tensor([8]), (4, 2, 2))
    for name, value in vars(alone).items():
        assert torch.equal(value[0], vars(together)[name][1])
    other = Draws.at(1, torch.tensor([8]), (4, 2, 2))
    assert not torch.equal(other.noise, alone.noise)


def test_draws_stay_what_they_were():
    """Runs that were begun by an earlier version go on with their times and noise."""
    draws = Draws.at(7, torch.tensor([3, 8]), (1, 1, 1))
    for found, expected in (
        (draws.normal, [0.8947760, 1.2883135]),
        (draws.noise.flatten(), [1.5627583, 0.1049898]),
        (draws.text, [0.3103647, 0.9370500]),
        (draws.teachers, [0.6563007, 0.2221694]),
    ):
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    assert draws.dropout.tolist() == [1607702830, 313465270]


def test_noise_by_counter_changes_the_noise_alone_and_depends_on_seed_and_position_only():
    places, shape = torch.tensor([3, 8]), (4, 3, 2)
    plain, drawn = Draws.at(0, places, shape), Draws.at(0, places, shape, "philox")
    for name, value in vars(plain).items():
        assert torch.equal(value, vars(drawn)[name]) == (name != "noise")
    assert drawn.noise.shape == plain.noise.shape
    assert drawn.noise.dtype == torch.float32
    alone = Draws.at(0, places[1:], shape, "philox")
    assert torch.equal(alone.noise[0], drawn.noise[1])
    assert not torch.equal(Draws.at(1, places[1:], shape, "philox").noise, alone.noise)
    first, _ = loss_and_gradient(student(), [make_batch()])
    other, _ = loss_and_gradient(
        student(), [make_batch()], replace(CONFIG, noise_generator="philox")
    )
    assert not torch.equal(first, other)


def test_dropped_captions_become_the_null_caption():
    model, batch = student(), make_batch()
    everything = replace(CONFIG, text_dropout=1.0)
    first, _ = loss_and_gradient(model, [batch], everything)
    other = replace(batch, t5_embeds=torch.randn_like(batch.t5_embeds))
    second, _ = loss_and_gradient(model, [other], everything)
    assert torch.equal(first, second)


def seen_teachers(batch, config):
    """Which samples' captions were kept, and which teachers the forward was given, ``[3, B]``."""
    seen = {}

    def forward(*args, **kwargs):
        seen["caption"] = (args[1] == batch.t5_embeds).all((1, 2))
        seen.update(lune=kwargs["lune_mask"], sol=kwargs["sol_mask"])
        return model(*args, **kwargs)

    model = student()
    null = (torch.randn(5, 24, generator=torch.Generator().manual_seed(2)), torch.ones(12))
    loss = training_loss(model, batch, config, 10, null, default_buckets(), velocity=forward)
    return torch.stack([seen["caption"], seen["lune"], seen["sol"]]), loss


def test_conditioning_drops_as_it_is_missing_in_use():
    batch = make_batch(600, 2, 2)
    batch.lune_mask = batch.sol_mask = torch.ones(600, dtype=torch.bool)
    config = replace(CONFIG, text_dropout=0.25, lune_dropout=0.25, sol_dropout=0.25)
    (caption, lune, sol), _ = seen_teachers(batch, config)
    assert torch.equal(lune, sol)  # one draw for both
    assert not lune[~caption].any()  # a dropped caption drops both
    # The states that sampling is in: a prompt, or none, and never a teacher.
    assert int((~caption & ~lune).sum()) == pytest.approx(150, abs=35)
    assert int((caption & ~lune).sum()) == pytest.approx(600 * 0.75 * 0.25, abs=35)


def test_each_teacher_keeps_its_own_share():
    batch = make_batch(600, 2, 2)
    batch.lune_mask = batch.sol_mask = torch.ones(600, dtype=torch.bool)
    config = replace(CONFIG, text_dropout=0.0, lune_dropout=0.5, sol_dropout=0.2)
    (_, lune, sol), _ = seen_teachers(batch, config)
    assert int(lune.sum()) == pytest.approx(300, abs=45)
    assert int(sol.sum()) == pytest.approx(480, abs=40)
    assert sol[lune].all()  # by one draw, whoever is spared the higher share is spared the lower
    (_, lune, sol), _ = seen_teachers(batch, replace(config, lune_dropout=1.0, sol_dropout=0.0))
    assert not lune.any()
    assert sol.all()


def test_a_dropped_caption_still_learns_from_its_teachers():
    batch = make_batch()
    batch.lune_mask = batch.sol_mask = torch.ones(len(batch), dtype=torch.bool)
    (_, lune, sol), loss = seen_teachers(batch, replace(CONFIG, text_dropout=1.0))
    assert not lune.any()
    assert not sol.any()
    assert loss.lune > 0
    assert loss.sol > 0


def test_samples_without_a_teacher_do_not_read_its_features():
    model, batch = student(), make_batch()
    first, _ = loss_and_gradient(model, [batch])
    nan = batch.lune.clone()
    nan[~batch.lune_mask] = float("nan")
    second, gradient = loss_and_gradient(model, [replace(batch, lune=nan)])
    assert torch.equal(first, second)
    assert gradient.isfinite().all()


def test_teachers_that_are_off_or_absent_cost_nothing():
    model, batch = student(), make_batch()
    bare = replace(
        batch, lune=None, lune_mask=None, sol_stats=None, sol_spatial=None, sol_mask=None
    )
    absent, _ = loss_and_gradient(model, [bare])
    off, _ = loss_and_gradient(model, [batch], replace(CONFIG, enable_lune=False, enable_sol=False))
    assert torch.equal(absent, off)
    assert absent[2] == absent[3] == 0
    assert absent[0] == absent[1]


def test_every_parameter_has_a_gradient_with_and_without_teachers():
    model, batch = student(), make_batch()
    bare = replace(batch, lune=None, sol_stats=None, sol_spatial=None)
    for some in (batch, bare):
        loss_and_gradient(model, [some])
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"use_lune_expert": False},
        {"use_sol_prior": False},
        {"use_lune_expert": False, "use_sol_prior": False},
        {"freeze_lune": True, "freeze_sol": True},
        {"sol_num_stats": 3},
        {"patch_size": 2},
        {"qk_norm": True, "gated_single_mlp": True, "mask_text_padding": True, "time_scale": 1e3},
    ],
)
def test_every_kind_of_student_trains(changes):
    loss, gradient = loss_and_gradient(student(**changes), [make_batch()])
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_patches_change_the_model_and_not_what_is_asked_of_it():
    """A student that says 0 has the same loss whatever its tokens are."""
    losses = []
    for patch in (1, 2):
        model = student(patch_size=patch)
        torch.nn.init.zeros_(model.final_linear.weight)
        torch.nn.init.zeros_(model.final_linear.bias)
        config = replace(CONFIG, use_spatial_weighting=False)
        batch = replace(make_batch(), mask=None)
        losses.append(loss_and_gradient(model, [batch], config)[0][1])
        held_out = HeldOut([batch], [[str(row) for row in range(len(batch))]])
        losses.append(
            torch.tensor(validate(model, held_out, config, default_buckets())["val_velocity"])
        )
    torch.testing.assert_close(losses[:2], losses[2:])


def test_latents_that_patches_do_not_fill_are_refused():
    with pytest.raises(InputError, match="latents of 5 x 6 do not divide into patches of 2 x 2"):
        loss_and_gradient(student(patch_size=2), [make_batch(height=5)])


def test_teacher_weights_warm_up_in_the_total():
    model, batch = student(), make_batch()
    config = replace(CONFIG, lune_warmup_steps=100, sol_warmup_steps=100)
    loss = training_loss(model, batch, config, 0, None, default_buckets())
    assert float(loss.total.detach()) == float(loss.main)
    loss = training_loss(model, batch, config, 1000, None, default_buckets())
    expected = loss.main + config.lune_weight * loss.lune + config.sol_weight * loss.sol
    torch.testing.assert_close(loss.total.detach(), expected)


def test_the_velocitys_snr_weight_is_a_setting():
    model, batch = student(), make_batch()
    epsilon, _ = loss_and_gradient(model, [batch])
    velocity, _ = loss_and_gradient(model, [batch], replace(CONFIG, snr_kind="velocity"))
    assert CONFIG.snr_kind == "epsilon"
    assert 0 < velocity[1] < epsilon[1]
    assert torch.equal(velocity[2:], epsilon[2:])


def test_tokens_go_row_by_row_and_back():
    latents = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    assert torch.equal(pack_latents(latents)[:, 7], latents[:, :, 1, 2])
    assert torch.equal(unpack_latents(pack_latents(latents), 4, 5), latents)


def test_incomplete_batches_are_refused():
    with pytest.raises(InputError, match="no 'clip_pooled'"):
        TrainBatch.from_dict(
            {"latents": torch.zeros(2, 4, 2, 2), "t5_embeds": torch.zeros(2, 5, 24)},
            torch.arange(2),
        )
    with pytest.raises(InputError, match="t5_embeds has 1 samples"):
        replace(make_batch(), t5_embeds=torch.zeros(1, 5, 24))


def test_validation_depends_on_neither_batches_nor_seed():
    model, batch = student(), make_batch()
    keys = [f"key{i}" for i in range(len(batch))]
    whole = validate(model, HeldOut([batch], [keys]), CONFIG, default_buckets())
    cut = validate(
        model,
        HeldOut([batch[:5], batch[5:]], [keys[:5], keys[5:]]),
        replace(CONFIG, seed=9),
        default_buckets(),
    )
    assert whole.keys() == {"val_velocity", "val_lune", "val_sol"}
    assert cut == pytest.approx(whole, rel=1e-5)
    assert model.training
