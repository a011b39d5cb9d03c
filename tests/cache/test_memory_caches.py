import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.errors import CacheError, InputError
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.cache_experts import (
    DatasetCache,
    EncodingCache,
    LuneFeatureCache,
    MultiSourceCache,
    SolFeatureCache,
)
from tinyflux.trainer.trainer import Trainer, TrainerConfig

CAPTIONS = ["red circle", "blue square", "green heart", "a yellow star", "white moon"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    return zoo_config(world).build(student_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", CAPTIONS)
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def cache(zoo, images):
    return DatasetCache.build(zoo, images, CAPTIONS, name="five")


def assert_equal(one, other):
    assert one.columns().keys() == other.columns().keys()
    for name, rows in one.columns().items():
        torch.testing.assert_close(other.columns()[name], rows, rtol=0, atol=0)


def test_a_dataset_comes_back_bit_equal(cache, tmp_path):
    cache.save(str(tmp_path / "all"))
    found = DatasetCache.load(str(tmp_path / "all"))
    assert found.name == "five"
    for part in ("encodings", "lune", "sol"):
        assert_equal(getattr(cache, part), getattr(found, part))
    assert found.encodings.recipe == cache.encodings.recipe.merged(cache.lune.recipe).merged(
        cache.sol.recipe
    )
    torch.testing.assert_close(found.encodings.null_text[0], cache.encodings.null_text[0].float())
    with pytest.raises(CacheError, match="already"):
        cache.save(str(tmp_path / "all"))


@pytest.mark.parametrize("part", ["encodings", "lune", "sol"])
def test_each_cache_alone_comes_back(cache, tmp_path, part):
    one = getattr(cache, part)
    one.save(str(tmp_path / part))
    assert_equal(one, type(one).load(str(tmp_path / part)))
    if part == "lune":
        with pytest.raises(CacheError, match="holds no latents"):
            EncodingCache.load(str(tmp_path / part))


def test_features_at_a_bucket_are_the_stored_ones(cache):
    rows, bucket = torch.tensor([3, 0]), 4
    t = cache.lune.t_buckets[[bucket, bucket]]
    found = cache.lune.get_features(rows, t)
    torch.testing.assert_close(found, cache.lune.features[rows, bucket].float())
    stats, spatial = cache.sol.get_features(rows, t)
    torch.testing.assert_close(stats, cache.sol.stats[rows, bucket].float())
    torch.testing.assert_close(spatial, cache.sol.spatial[rows, bucket].float())


def test_prompts_alone_give_features_of_the_same_shape(zoo, cache):
    lune = LuneFeatureCache.build(zoo, CAPTIONS[:2], batch_timesteps=True)
    sol = SolFeatureCache.build(zoo, CAPTIONS[:2], t_buckets=torch.tensor([0.2, 0.6]))
    assert lune.features.shape == (2, *cache.lune.features.shape[1:])
    assert sol.stats.shape == (2, 2, 4)


def test_sources_without_a_teacher_stand_beside_sources_with_one(cache):
    bare = DatasetCache(cache.encodings, lune=cache.lune)
    many = MultiSourceCache().add(cache, 7).add(bare, 2)
    rows, ids, t = torch.tensor([1, 4, 0]), torch.tensor([2, 7, 7]), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(many.get_lune(rows, ids, t), cache.lune.get_features(rows, t))
    stats, _ = many.get_sol(rows, ids, t)
    assert not stats[0].any()
    assert many.gather(rows, ids)["sol_mask"].tolist() == [False, True, True]
    assert many.get_sol(rows[:1], ids[:1], t[:1]) == (None, None)
    with pytest.raises(InputError, match="no dataset was added as 9"):
        many.gather(rows, torch.tensor([9, 7, 7]))


def test_sources_whose_captions_were_read_by_other_encoders_are_refused(cache):
    t5, pooled = cache.encodings.null_text
    columns = cache.encodings.columns()
    named = {
        "alike": (t5 + 1e-3 * t5.abs().max(), pooled),  # as another machine computes it
        "untold": None,
        "other": (t5 + 1, pooled),
        "longer": (torch.cat([t5, t5]), pooled),
    }
    made = {
        name: DatasetCache(EncodingCache(**columns, null_text=text), name=name)
        for name, text in named.items()
    }
    many = MultiSourceCache().add(made["untold"], 0).add(cache, 1).add(made["alike"], 2)
    for name in ("other", "longer"):
        with pytest.raises(InputError, match=f"'{name}' has other embeddings of the empty caption"):
            many.add(made[name], 3)
    assert many.dataset_ids == (0, 1, 2)
    assert many.null_text is cache.encodings.null_text


def test_the_trainer_learns_from_the_caches(cache, tmp_path):
    torch.manual_seed(0)
    config = TrainerConfig(
        total_steps=3,
        gradient_accumulation=1,
        warmup_steps=0,
        save_every_steps=None,
        log_every=1,
        checkpoint_dir=str(tmp_path / "ck"),
        tensorboard_dir=str(tmp_path / "tb"),
        dtype=torch.float32,
    )
    model = TinyFluxDeep(student_config())
    before = model.final_linear.weight.clone()
    trainer = Trainer(model, config)
    many = MultiSourceCache().add(cache, 0)
    trainer.setup(DataLoader(cache.encodings, batch_size=2, shuffle=True), many)
    trainer.train(epochs=1)
    assert trainer.current_step == 3
    assert not torch.equal(model.final_linear.weight, before)


def test_tensors_of_several_lengths_are_refused():
    with pytest.raises(InputError, match="one length"):
        EncodingCache(torch.zeros(2, 1, 2, 2), torch.zeros(3, 4, 5), torch.zeros(2, 5))
