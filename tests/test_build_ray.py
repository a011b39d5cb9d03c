"""The build job on a real Ray, against the same extraction without it."""

import shutil

import pytest
import torch

from tests.test_cache import CAPTIONS, data_config, start_build, write_pictures
from tests.worlds import make_world, student_config, zoo_config
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import CacheConfig, Extractor
from tinyflux.cache.sources import list_sources, read_samples
from tinyflux.distributed.build import build_cache, refuse_impossible_actor
from tinyflux.errors import CacheError, ConfigError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_an_actor_that_this_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    refuse_impossible_actor(CacheConfig(cpus_per_actor=2))
    with pytest.raises(ConfigError, match=r"cpus_per_actor is 4, but this machine has 2 CPUs"):
        refuse_impossible_actor(CacheConfig(cpus_per_actor=4))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may grow
    refuse_impossible_actor(CacheConfig(cpus_per_actor=4))


@pytest.mark.slow
def test_ray_builds_what_a_bare_loop_builds_and_goes_on_after_a_mended_picture(tmp_path, world):
    pictures, out = write_pictures(tmp_path / "pictures"), tmp_path / "cache"
    shutil.copy(pictures / "4.png", tmp_path / "whole.png")
    (pictures / "4.png").write_bytes(b"nothing")
    assert start_build(tmp_path, pictures, world, out, actors=1).wait(timeout=240) != 0
    kept = {path: path.stat().st_mtime_ns for path in out.glob("receipts/*.json")}

    # Only what has no receipt, or another picture by now, is made.
    shutil.copy(tmp_path / "whole.png", pictures / "4.png")
    assert start_build(tmp_path, pictures, world, out, actors=2).wait(timeout=240) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    opened, data = CachedDataset(out), data_config(pictures)
    opened.verify()
    assert opened.captions() == CAPTIONS
    torch.set_num_threads(1)  # as in an actor of one CPU
    extractor = Extractor(zoo_config(world).build(student_config()), batch_size=2)
    # Shards of one row: batches of one.
    batches = ([sample] for sample in read_samples(data, list_sources(data)))
    keys, columns = extractor.join(batches)
    assert opened.keys() == keys
    assert opened.manifest.recipe == extractor.recipe()
    for name, rows in opened.read(range(5)).items():
        assert torch.equal(rows, columns[name].float()), name
    t5, pooled = extractor.text([""], allow_empty=True)
    assert torch.equal(opened.null_text[0], t5[0].float())
    assert torch.equal(opened.null_text[1], pooled[0].float())

    # A finished dataset is left as it is, without Ray, until its pictures are others.
    config = CacheConfig(str(out), num_actors=1, rows_per_shard=1, batch_size=2)
    again = build_cache(data, zoo_config(world), config, student_config())
    assert again == opened.manifest
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(CacheError, match="other pictures or captions"):
        build_cache(data, zoo_config(world), config, student_config())
