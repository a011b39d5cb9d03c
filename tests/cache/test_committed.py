"""What a build lists of its shards while it is still at work."""

from dataclasses import replace

import pytest

from tests.fixtures.caches import CAPTIONS, build_configs, build_some, changed, make
from tests.fixtures.worlds import make_world, write_pictures
from tinyflux.cache.committed import UNFINISHED_NAME, load_committed, shard_id, with_shards
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.manifest import Manifest
from tinyflux.errors import CacheError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def configs(world, tmp_path):
    return build_configs(tmp_path, world, CAPTIONS, rows_per_shard=3)


def test_a_build_lists_its_whole_shards_until_it_has_a_manifest(configs):
    store = configs.store
    build_some(configs, 0)
    with pytest.raises(CacheError, match="has no whole shard yet"):
        load_committed(store)
    listed = []
    for more in (2, 1):
        build_some(configs, more)
        manifest, finished = load_committed(store)
        assert not finished
        assert [shard in manifest.shards for shard in listed] == [True] * len(listed)
        listed = list(manifest.shards)
    assert len(listed) == 3
    part = CachedDataset(store.directory, manifest=manifest)
    assert len(part) == sum(shard.samples for shard in listed)
    assert part.null_text is not None
    with pytest.raises(CacheError, match="is not finished"):
        CachedDataset(store.directory)

    make(configs)
    assert store.size(UNFINISHED_NAME) is None
    whole, finished = load_committed(store)
    assert finished
    assert whole == Manifest.load(store)
    assert len(whole.shards) > 3
    assert [shard in whole.shards for shard in listed] == [True] * 3
    dataset = CachedDataset(store.directory)
    rows = [dataset.keys().index(key) for key in part.each("keys")]
    found, expected = part.read(range(len(part))), dataset.read(rows)
    assert all((found[name] == values).all() for name, values in expected.items())


def test_a_dataset_that_is_finished_stays_what_it_is_while_another_build_works(configs):
    make(configs)
    before = load_committed(configs.store)
    write_pictures(configs.store.directory.parent / "pictures", [*CAPTIONS, "a house", "a tree"])
    build_some(configs, 1)
    assert configs.store.size(UNFINISHED_NAME) is None
    assert load_committed(configs.store) == before


def test_shards_of_other_models_are_listed_no_more(configs):
    build_some(configs, 2)
    assert len(load_committed(configs.store)[0].shards) == 2
    build_some(changed(configs, model={"t5_layers": (1,)}), 0)
    assert configs.store.size(UNFINISHED_NAME) is None
    build_some(configs, 0)
    assert len(load_committed(configs.store)[0].shards) == 2


def test_a_run_knows_shards_by_their_samples_and_numbers(configs):
    make(configs)
    manifest = Manifest.load(configs.store)
    ids = [shard_id(shard) for shard in manifest.shards]
    assert len(set(ids)) == len(ids)
    chosen = [ids[2], ids[0]]
    part = with_shards(manifest, chosen, "here")
    assert [shard_id(shard) for shard in part.shards] == chosen
    assert part.rows == sum(shard.samples for shard in part.shards)
    # Another file of a group, or other rows left out, make another shard; another name of a
    # picture's file does not.
    first = manifest.shards[0]
    for group, same in (("latents", False), ("sol", False), ("rows", True)):
        files = {**first.files, group: replace(first.files[group], sha256="0" * 64)}
        assert (shard_id(replace(first, files=files)) == ids[0]) == same
    assert shard_id(replace(first, dropped=(0,))) != ids[0]
    with pytest.raises(CacheError, match=r"does not list 1 of the 2 shards .* use a new run_dir"):
        with_shards(manifest, [ids[0], "0" * 33], "here")
