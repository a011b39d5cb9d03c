"""Plans of stages, added up."""

import json
from dataclasses import replace

import pytest
import torch

from tests.fixtures.worlds import student_config
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig
from tinyflux.distributed.config import ClusterConfig
from tinyflux.errors import ConfigError
from tinyflux.plan.plan import make_plan
from tinyflux.plan.stages import plan_stages
from tinyflux.trainer.config import TrainerConfig


def a_run(path, side, **trainer):
    """A small student on CPUs of a stated speed."""
    return RunConfig(
        data=DataConfig(height=side, width=side),
        cache=CacheConfig(path),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, dtype=torch.float32, **trainer
        ),
        cluster=ClusterConfig(tflops=0.01, samples=100_000, price_per_node_hour=2.0),
    )


def test_stages_add_up_and_a_shared_cache_is_counted_once(tmp_path):
    cache = str(tmp_path / "cache")
    one, two = a_run(cache, 32), a_run(cache, 32, total_steps=500)
    other = a_run(str(tmp_path / "other"), 64)
    plan = plan_stages({"one": one, "two": two, "other": other})
    alone = [make_plan(run) for run in (one, two, other)]
    caches = [single.cache.hours for single in alone]
    assert caches[0] == caches[1] < caches[2]
    trained = sum(single.training.hours for single in alone)
    assert plan.hours == pytest.approx(trained + caches[0] + caches[2])
    assert plan.price == pytest.approx(2 * plan.hours)
    text = str(plan)
    assert all(f"stage {name}" in text for name in ("one", "two", "other"))
    assert text.splitlines()[-1].startswith("all stages: ")
    said = json.loads(plan.to_json())
    assert list(said["stages"]) == ["one", "two", "other"]
    assert said["stages"]["two"]["training"]["steps"] == 500

    kept = alone[0].cache.total_bytes + alone[2].cache.total_bytes
    kept += sum(single.training.bytes_kept for single in alone)
    for room, fits in ((kept + 1e6, True), (kept - 1e6, False)):
        cluster = replace(one.cluster, storage_gb=room / 1e9)
        runs = {
            name: replace(run, cluster=cluster)
            for name, run in (("one", one), ("two", two), ("other", other))
        }
        if fits:
            plan_stages(runs)
        else:
            with pytest.raises(ConfigError, match=r"of all stages .* do not fit"):
                plan_stages(runs)


def test_what_cannot_be_planned_names_its_stage(tmp_path):
    run = a_run(str(tmp_path), 32)
    with pytest.raises(ConfigError, match="stage 'two': the workers' speed is not known"):
        plan_stages({"one": run, "two": replace(run, cluster=ClusterConfig(samples=10))})
