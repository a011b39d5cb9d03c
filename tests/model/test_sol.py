"""Sol's features in units in which they count: ``TinyFluxConfig.sol_standardize``."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from tests.fixtures.students import MODEL, make_batch
from tests.fixtures.trainers import Encodings, Features, settings
from tinyflux.data.batches import HeldOut
from tinyflux.errors import CheckpointError, TrainingError
from tinyflux.model.experts import SolPrior, SolUnits
from tinyflux.model.loader import load_config, load_model, save_model
from tinyflux.model.model import TinyFluxDeep, preset
from tinyflux.trainer.cache_experts import (
    DatasetCache,
    EncodingCache,
    LuneFeatureCache,
    MultiSourceCache,
    SolFeatureCache,
)
from tinyflux.trainer.checkpoint import load_checkpoint
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.engine import TorchEngine
from tinyflux.trainer.step import training_loss
from tinyflux.trainer.trainer import Trainer
from tinyflux.trainer.validation import validate
from tinyflux.util.buckets import default_buckets, interpolate_buckets

CONFIG = TrainerConfig(
    sol_warmup_steps=0, text_dropout=0.3, sol_dropout=0.3, use_huber_loss=False, dtype=torch.float32
)
STANDARD = replace(MODEL, sol_standardize=True)
UNITS = "sol_prior.units."


def features(pooled, seed=0):
    """Features as Sol's are: far from 0, near each other, and told in part by the caption."""
    random = torch.Generator().manual_seed(seed)
    know_stats = torch.randn(12, 4, generator=random) / 12**0.5
    know_maps = torch.randn(12, 64, generator=random) / 12**0.5
    times = default_buckets()
    own = torch.randn(len(pooled), 1, 4, generator=random)
    stats = 0.7 - 0.2 * times[:, None] + 0.01 * (pooled @ know_stats)[:, None] + 0.002 * own
    maps = 1 + 0.3 * times[:, None] * torch.linspace(-1, 1, 64)
    maps = maps + 0.1 * (pooled @ know_maps)[:, None]
    maps = maps.unflatten(-1, (8, 8))
    return stats, maps / maps.sum((-2, -1), keepdim=True)


def taught_batch(size, seed):
    batch = make_batch(size, seed=seed)
    stats, maps = features(batch.clip_pooled)
    everyone = torch.ones(size, dtype=torch.bool)
    return replace(batch, sol_stats=stats, sol_spatial=maps, sol_mask=everyone, lune=None)


def at(batch, times):
    """Sol's statistics and maps of a batch at ``times`` ``[B]``."""
    buckets = default_buckets()
    return tuple(
        interpolate_buckets(part, buckets, times) for part in (batch.sol_stats, batch.sol_spatial)
    )


def measured(batch):
    units = SolUnits(8, 4)
    units.measure(batch.sol_stats, batch.sol_spatial, default_buckets())
    return units


def test_units_have_mean_0_and_variance_1_at_every_time_and_come_back():
    batch = taught_batch(200, 1)
    units = measured(batch)
    for time in default_buckets():
        t = time.expand(200)
        stats, maps = at(batch, t)
        found, found_maps = units.standardise(stats, maps, t)
        torch.testing.assert_close(found.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
        torch.testing.assert_close(found.var(0, correction=0), torch.ones(4), rtol=1e-3, atol=0)
        assert found_maps.square().mean().item() == pytest.approx(1, rel=1e-3)
        back, back_maps = units.restore(found, found_maps, t)
        torch.testing.assert_close((back, back_maps), (stats, maps), rtol=1e-5, atol=1e-7)


def test_features_asked_at_other_times_are_measured_at_the_same():
    batch = taught_batch(50, 1)
    fine = torch.linspace(0, 1, 41)
    values = [torch.stack([at(batch, t.expand(50))[i] for t in fine], 1) for i in (0, 1)]
    other = SolUnits(8, 4)
    other.measure(*values, fine)
    torch.testing.assert_close(other.state_dict(), measured(batch).state_dict(), rtol=2e-3, atol=0)


def test_what_never_differs_is_not_blown_up():
    batch = taught_batch(6, 1)
    batch.sol_stats[:] = 0.25
    t = torch.full((6,), 0.5)
    stats, maps = at(batch, t)
    found, _ = measured(batch).standardise(stats + 1e-4, maps, t)
    assert found.abs().max() < 0.2


def test_maps_that_are_used_have_mean_1_and_another_picture_has_another():
    """As published a map of mean 1/64 is added to a prior of mean 0.5 to 1, and is lost there."""
    batch = taught_batch(12, 1)
    t = torch.linspace(0.1, 0.9, 12)
    stats, maps = at(batch, t)
    shift = {}
    for standardize in (False, True):
        torch.manual_seed(0)
        prior = SolPrior(48, 12, 16, 3, 8, 4, 0.5, standardize)
        if standardize:
            prior.units.measure(batch.sol_stats, batch.sol_spatial, default_buckets())
        given = torch.randn(12, 48), batch.clip_pooled, t
        _, own, _, predicted = prior(*given, stats, maps, None)
        _, other, _, _ = prior(*given, stats, maps.roll(1, 0), None)
        _, absent, _, _ = prior(*given, None, None, None)
        shift[standardize] = (own - other).square().mean().sqrt().item()
        if standardize:
            for used in (own, other, absent):
                torch.testing.assert_close(used.mean((-2, -1)), torch.ones(12))
            torch.testing.assert_close(predicted.sum((-2, -1)), torch.ones(12))
    assert shift[True] > 0.04
    assert shift[False] < 0.002


def test_an_untrained_student_predicts_the_constant_and_its_loss_is_2():
    batch = taught_batch(400, 1)
    torch.manual_seed(0)
    model = TinyFluxDeep(STANDARD).train()
    model.sol_units.measure(batch.sol_stats, batch.sol_spatial, default_buckets())
    loss = training_loss(model, batch, CONFIG, 10, None, default_buckets())
    assert loss.sol.item() == pytest.approx(2, rel=0.1)
    loss.total.backward()
    norm = model.sol_prior.stat_predictor[-1].weight.grad.norm() / CONFIG.sol_weight
    assert 0.1 < norm < 10


def test_the_predictor_beats_a_constant_on_held_out_pictures():
    """With ``sol_standardize`` off its errors are many times those of the constant."""
    train, held_out = taught_batch(256, 1), taught_batch(64, 2)
    units = measured(train)
    config = replace(CONFIG, learning_rate=3e-3, text_dropout=0.0, sol_dropout=1.0, sol_weight=1.0)
    t = torch.linspace(0.05, 0.95, 64)
    wanted = units.standardise(*at(held_out, t), t)
    errors = {}
    for standardize in (False, True):
        torch.manual_seed(0)
        model = TinyFluxDeep(replace(MODEL, sol_standardize=standardize)).train()
        if standardize:
            model.sol_units.load_state_dict(units.state_dict())
        engine = TorchEngine(model, config)
        for step in range(120):
            rows = slice(step % 4 * 64, step % 4 * 64 + 64)
            loss = training_loss(model, train[rows], config, step, None, default_buckets())
            engine.backward(loss.total, last=True)
            engine.step(config.learning_rate)
        with torch.no_grad():
            found = model.sol_prior(model.time_in(t), held_out.clip_pooled, t, None, None, None)
        found = units.standardise(found[2], found[3], t)
        errors[standardize] = [
            ((one - other).square().mean() / other.square().mean()).item()
            for one, other in zip(found, wanted, strict=True)
        ]
    assert max(errors[True]) < 0.6
    assert min(errors[False]) > 1


def test_validation_says_how_the_predictor_compares_with_a_constant():
    batch = taught_batch(40, 1)
    model = TinyFluxDeep(STANDARD)
    model.sol_units.measure(batch.sol_stats, batch.sol_spatial, default_buckets())
    held_out = HeldOut([batch], [[f"key{index}" for index in range(40)]])
    found = validate(model, held_out, CONFIG, default_buckets())
    assert found["val_sol_relative"] == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        model.sol_prior.stat_predictor[-1].bias += 1
    found = validate(model, held_out, CONFIG, default_buckets())
    assert found["val_sol_relative"] == pytest.approx(1.5, rel=0.1)


def test_a_model_saved_before_has_sol_as_it_was(tmp_path):
    """Also one of a preset that has it now: a saved config says everything, and this it lacks."""
    old = TinyFluxDeep(replace(preset("toy"), sol_standardize=False))
    save_model(old, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["sol_standardize"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert preset("toy").sol_standardize
    assert not load_config(tmp_path).sol_standardize
    loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(loaded.state_dict(), old.state_dict(), rtol=0, atol=0)
    assert not [name for name in loaded.state_dict() if name.startswith(UNITS)]


def test_presets_of_published_checkpoints_leave_sol_as_it_is():
    assert not preset("default").sol_standardize
    assert not preset("tiny-flux-deep").sol_standardize


def test_a_saved_student_keeps_its_units(tmp_path):
    batch = taught_batch(30, 1)
    model = TinyFluxDeep(STANDARD).eval()
    model.sol_units.measure(batch.sol_stats, batch.sol_spatial, default_buckets())
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.sol_units.measured
    half = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.sol_units.measured


def a_cache(batch):
    encodings = EncodingCache(batch.latents, batch.t5_embeds, batch.clip_pooled)
    buckets = default_buckets()
    lune = LuneFeatureCache(torch.randn(len(batch), 10, 20), buckets)
    return DatasetCache(
        encodings, lune, SolFeatureCache(batch.sol_stats, batch.sol_spatial, buckets)
    )


def test_the_trainer_measures_its_cache_once_and_continues_exactly(tmp_path):
    cache, other = (a_cache(taught_batch(12, seed)) for seed in (1, 2))

    def trainer(cache, name):
        torch.manual_seed(0)
        made = Trainer(
            TinyFluxDeep(STANDARD),
            settings(tmp_path / name, gradient_accumulation=1, text_dropout=0.0),
        )
        loader = DataLoader(cache.encodings, batch_size=4, shuffle=True)
        return made, loader, MultiSourceCache().add(cache, 0)

    whole, *data = trainer(cache, "whole")
    whole.setup(*data)
    wanted = SolUnits(8, 4)
    wanted.measure(cache.sol.stats, cache.sol.spatial, default_buckets())
    found = whole.model.sol_units.state_dict()
    torch.testing.assert_close(found, wanted.state_dict(), rtol=0, atol=0)
    averaged = {n.removeprefix(UNITS): t for n, t in whole.ema.shadow.items() if UNITS in n}
    torch.testing.assert_close(averaged, dict(found), rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in found.items()}
    whole.train(1)
    whole.save_checkpoint(str(tmp_path / "middle"))
    whole.train(1)

    again, *data = trainer(cache, "again")
    again.setup(*data)
    again.load_checkpoint(str(tmp_path / "middle"))
    again.train(1)
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.ema.shadow, whole.ema.shadow, rtol=0, atol=0)

    # On another cache the units stay those that the weights were trained with.
    tuned, *data = trainer(other, "tuned")
    tuned.model.load_state_dict(whole.model.state_dict())
    tuned.setup(*data)
    torch.testing.assert_close(dict(tuned.model.sol_units.state_dict()), before, rtol=0, atol=0)


def test_a_trainer_that_cannot_know_the_units_says_so(tmp_path):
    data = Encodings()
    trainer = Trainer(TinyFluxDeep(STANDARD), settings(tmp_path, text_dropout=0.0))
    trainer.setup(DataLoader(data, 3, shuffle=True), Features(data.batch))
    with pytest.raises(TrainingError, match="measure"):
        trainer.train()
    trainer.model.sol_units.measure(data.batch.sol_stats, data.batch.sol_spatial, default_buckets())
    trainer.train()
    assert trainer.current_step


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    trainer = Trainer(TinyFluxDeep(MODEL), settings(tmp_path))
    trainer.save_checkpoint(str(tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match=r"sol_prior\.units\.stats_mean is missing"):
        load_checkpoint(tmp_path / "checkpoint").check(TinyFluxDeep(STANDARD))
