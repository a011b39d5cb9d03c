"""Several caches trained on as one."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig, MixSource
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.distributed.data import measure_sol
from tinyflux.errors import CacheError, ConfigError
from tinyflux.model.experts import SolUnits
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.step import training_loss

CONFIG = TrainerConfig(batch_size=8, gradient_accumulation=2, dtype=torch.float32)


def test_samples_without_a_teacher_say_so_and_the_others_are_as_they_were(caches):
    both = CacheMixture(caches)
    first, second = both.caches
    assert len(both) == len(first) + len(second)
    rows = [len(first) + 1, 0, len(first), 2]
    data = both.read(rows)
    assert data["lune_mask"].tolist() == data["sol_mask"].tolist() == [False, True, False, True]
    taught, plain = first.read([0, 2]), second.read([1, 0])
    for name, tensor in taught.items():
        assert torch.equal(data[name][[1, 3]], tensor)
    for name, tensor in plain.items():
        assert torch.equal(data[name][[0, 2]], tensor)
    assert not data["lune"][[0, 2]].any()


def test_a_run_on_a_mixture_gets_its_weights_and_trains(caches):
    both = CacheMixture(caches)
    held_out = both.held_out(0.2)
    assert 0 < held_out.sum() < len(both)
    model = TinyFluxDeep(student_config()).train()
    seen = []
    for item in islice(StepReader(both, held_out, 8, accumulation=2).steps(), 6):
        assert item.size == sum(map(len, item.micro_batches)) == 8
        taught = torch.cat([batch.lune_mask for batch in item.micro_batches])
        assert taught.sum() == 2  # of 8, with weights 1 and 3
        for batch in item.micro_batches:
            loss = training_loss(model, batch, CONFIG, 3, both.null_text, both.t_buckets)
            assert loss.total.isfinite()
        seen.append(item.micro_batches[0].positions[0].item())
    assert seen == [0, 8, 16, 24, 32, 40]
    validated = read_held_out(both, held_out)
    assert sum(map(len, validated.keys)) == held_out.sum()


def build_again(folder, seed=0, **zoo):
    """A cache of the same model whose captions other encoders, or another precision, read."""
    made = zoo_config(make_world(folder / "world", seed))
    pictures = write_pictures(folder / "pictures", CAPTIONS[:2], seed=3)
    configs = BuildConfigs(
        DataConfig(str(pictures), height=16, width=16),
        replace(made, **zoo),
        CacheConfig(str(folder / "cache"), extract_lune=False, extract_sol=False),
        student_config(),
    )
    build(configs, LocalRunner(configs))
    return MixSource(configs.cache.path)


def test_caches_whose_captions_were_read_by_other_encoders_are_not_mixed(caches, tmp_path):
    other = build_again(tmp_path, seed=1)
    with pytest.raises(CacheError, match="embeddings of the empty caption") as refused:
        CacheMixture([*caches, other])
    assert caches[0].path in str(refused.value)
    assert other.path in str(refused.value)


def test_caches_of_one_encoder_in_two_precisions_are_mixed(caches, tmp_path):
    half = build_again(tmp_path, dtype=torch.bfloat16)
    both, alone = CacheMixture([*caches, half]), CacheMixture(caches[:1])
    assert not torch.equal(both.caches[2].null_text[0], alone.null_text[0])
    assert all(map(torch.equal, both.null_text, alone.null_text))


def test_a_run_measures_sol_on_the_rows_that_it_trains_on(caches):
    both = CacheMixture(caches)
    held_out = both.held_out(0.2)
    first, plain = both.rows_of(0), both.rows_of(1)
    taught = CacheMixture(caches[:1])
    everything, units, mixed, nothing = (SolUnits(8, 4) for _ in range(4))
    rows = np.flatnonzero(~held_out[: len(first)]).tolist()
    sol = taught.read(rows, groups=("sol",))
    assert sol.keys() == {"sol_stats", "sol_spatial"}
    everything.measure(sol["sol_stats"], sol["sol_spatial"], taught.t_buckets)
    # One batch is all rows once, in another order.
    whole = StepReader(taught, held_out[first.start : first.stop], len(rows))
    measure_sol(units, whole)
    torch.testing.assert_close(units.state_dict(), everything.state_dict(), rtol=1e-4, atol=1e-6)
    # Samples without Sol are left out, not counted as zeros.
    measure_sol(mixed, StepReader(both, held_out, 8))
    assert mixed.map_mean.mean().item() == pytest.approx(1, rel=1e-3)
    untaught = CacheMixture(caches[1:])
    measure_sol(nothing, StepReader(untaught, held_out[plain.start : plain.stop], 8))
    assert not nothing.measured


def test_the_split_of_a_cache_is_the_same_alone_and_in_a_mixture(caches):
    both, alone = CacheMixture(caches), CacheMixture(caches[:1])
    assert np.array_equal(both.held_out(0.3)[: len(alone)], alone.held_out(0.3))
    assert not both.held_out(0.0).any()


def test_a_cache_that_does_not_fit_is_named(caches):
    both = CacheMixture(caches)
    both.check(student_config(), True, True)
    with pytest.raises(CacheError, match=r"taught.*t5_layers"):
        both.check(student_config(t5_layers=(2,)), True, True)
    with pytest.raises(CacheError, match=r"plain.*no lune"):
        CacheMixture(caches[1:]).check(student_config(), True, True)
    with pytest.raises(ConfigError, match="weight of cache 'x' must be above 0"):
        replace(caches[0], path="x", weight=0.0)
