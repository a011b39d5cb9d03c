import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.config import CacheConfig
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import Extractor, Sample
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.shards import ShardReader, write_null_text, write_shard
from tinyflux.cache.store import LocalStore
from tinyflux.cache.verify import verify
from tinyflux.errors import CacheError, ConfigError
from tinyflux.trainer.cache_experts import EncodingCache

CAPTIONS = ["red circle", "blue square", "green heart", "a yellow star", "white moon"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", CAPTIONS)


@pytest.fixture(scope="module")
def columns(world, pictures):
    samples = [
        Sample(f"{row:032x}", caption, Image.open(path))
        for row, (caption, path) in enumerate(
            zip(CAPTIONS, sorted(pictures.glob("*.png")), strict=True)
        )
    ]
    extractor = Extractor(zoo_config(world).build(student_config()), batch_size=2)
    values = extractor.columns(("latents", "text", "lune", "sol"), samples)
    return samples, {"caption": CAPTIONS, **values}, extractor


def write_dataset(directory: Path, columns, rows_per_shard=2) -> Path:
    samples, values, extractor = columns
    shards = []
    for start in range(0, len(samples), rows_per_shard):
        part = slice(start, start + rows_per_shard)
        cut = {name: value[part] for name, value in values.items()}
        keys = [sample.key for sample in samples[part]]
        shards.append(write_shard(LocalStore(directory), f"{start:05d}", keys, cut, trim_text=True))
    null_text = write_null_text(LocalStore(directory), *extractor.null_text())
    manifest = Manifest(len(samples), extractor.recipe(), tuple(shards), null_text)
    manifest.save(LocalStore(directory))
    return directory


@pytest.fixture
def dataset(tmp_path, columns):
    return write_dataset(tmp_path / "cache", columns)


@pytest.mark.parametrize("rows_per_shard", [1, 2, 5])
def test_rows_come_back_bit_equal_in_any_order_and_layout(tmp_path, columns, rows_per_shard):
    _, values, _ = columns
    opened = CachedDataset(write_dataset(tmp_path / "cache", columns, rows_per_shard))
    assert len(opened) == 5
    assert opened.captions() == CAPTIONS
    order = [4, 0, 3, 3]
    found = opened.read(order)
    assert found.keys() == {
        "latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial",
    }  # fmt: skip
    for name, rows in found.items():
        torch.testing.assert_close(rows, values[name][order].float(), rtol=0, atol=0)
    assert verify(LocalStore(tmp_path / "cache")) == []


@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    length=st.integers(1, 6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    trim=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_tensors_of_any_shape_come_back_bit_equal(
    tmp_path_factory, rows, channels, size, length, dtype, trim, seed
):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, channels, *size, generator=generator).to(dtype)
    t5 = torch.randn(rows, length, 3, generator=generator).to(dtype)
    for row, used in enumerate(torch.randint(0, length + 1, (rows,), generator=generator)):
        t5[row, used:] = 0  # down to captions without a single token
    directory = LocalStore(tmp_path_factory.mktemp("shard"))
    columns = {"latents": latents, "t5_embeds": t5, "clip_pooled": t5[:, 0]}
    shard = write_shard(directory, "a", [str(row) for row in range(rows)], columns, trim)
    order = torch.randint(0, rows, (5,), generator=generator)
    reader = ShardReader(directory, max_open=1)
    for name, group in (("latents", "latents"), ("t5_embeds", "text"), ("clip_pooled", "text")):
        found = reader.tensor(shard, group, name, order.numpy())
        assert found.dtype == dtype
        assert torch.equal(found, columns[name][order])


def test_features_do_not_depend_on_batch_or_order(world, columns):
    samples, values, _ = columns
    other = Extractor(zoo_config(world).build(student_config()), batch_size=5, batch_timesteps=True)
    found = other.columns(("latents", "text", "lune", "sol"), samples[::-1])
    for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
        torch.testing.assert_close(found[name].flip(0), values[name], rtol=2e-3, atol=2e-3)


def test_another_seed_gives_other_teacher_features(world, columns):
    samples, values, _ = columns
    other = Extractor(zoo_config(world).build(student_config()), seed=1, batch_size=2).columns(
        ("latents", "lune"), samples
    )
    torch.testing.assert_close(other["latents"], values["latents"], rtol=0, atol=0)
    assert not torch.equal(other["lune"], values["lune"])


def test_a_shard_is_plain_parquet(dataset):
    table = pq.read_table(dataset / "shards" / "00000.latents.parquet")
    assert table.column_names == ["key", "latents"]
    field = table.schema.field("latents")
    assert json.loads(field.metadata[b"tinyflux.shape"]) == [4, 4, 4]
    assert field.metadata[b"tinyflux.dtype"] == b"float16"
    frame = pq.read_table(dataset / "shards" / "00000.rows.parquet").to_pandas()
    assert list(frame.caption) == CAPTIONS[:2]


def test_duckdb_joins_the_groups_and_reads_the_numbers(dataset, columns):
    duckdb = pytest.importorskip("duckdb")
    shards = dataset / "shards"
    rows = duckdb.sql(
        f"select caption, latents, t5_length from '{shards}/*.rows.parquet' join "
        f"'{shards}/*.latents.parquet' using (key) join '{shards}/*.text.parquet' using (key)"
    ).fetchall()
    found = {caption: (np.frombuffer(raw, "<f2"), tokens) for caption, raw, tokens in rows}
    _, values, _ = columns
    assert set(found) == set(CAPTIONS)
    for caption, latent, t5 in zip(CAPTIONS, values["latents"], values["t5_embeds"], strict=True):
        raw, tokens = found[caption]
        assert np.array_equal(raw, latent.flatten().numpy())
        assert t5[tokens - 1].any()
        assert not t5[tokens:].any()


def test_a_cache_made_of_tensors_says_that_it_has_no_captions(tmp_path):
    EncodingCache(torch.ones(2, 4, 4, 4), torch.ones(2, 24, 16), torch.ones(2, 16)).save(
        str(tmp_path / "memory")
    )
    opened = CachedDataset(tmp_path / "memory")
    assert len(set(opened.keys())) == 2
    with pytest.raises(CacheError, match="holds no captions"):
        opened.captions()


def test_more_rows_than_a_page_holds_are_refused():
    with pytest.raises(ConfigError, match="rows_per_shard must be at most"):
        CacheConfig(rows_per_shard=20000)


def test_what_is_not_listed_does_not_exist(dataset, tmp_path):
    (dataset / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no cache at"):
        CachedDataset(dataset)


def test_a_manifest_from_the_future_is_refused(dataset):
    path = dataset / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(CacheError, match="format version 99"):
        CachedDataset(dataset)


def test_a_truncated_file_is_refused_and_a_flipped_byte_is_found(dataset):
    path = dataset / "shards" / "00000.lune.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"00000\.lune\.parquet"):
        CachedDataset(dataset)
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    (problem,) = verify(LocalStore(dataset))
    assert str(problem) == "shards/00000.lune.parquet: its checksum differs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t5_layers": (0, 1)}, r"t5_layers = \[0, 1, 2\], the model has \[0, 1\]"),
        ({"latent_shift": 0.5}, "latent_shift = 0.0, the model has 0.5"),
        ({"text_padding": "encoder"}, "text_padding = zero"),
        ({"max_text_length": 30}, "max_text_length = 24"),
        ({"in_channels": 8}, r"model\.in_channels is 8"),
        ({"lune_expert_dim": 8}, r"model\.lune_expert_dim is 8"),
    ],
)
def test_a_cache_for_another_model_names_what_differs(dataset, changes, message):
    opened = CachedDataset(dataset)
    opened.check(student_config(), True, True)
    with pytest.raises(CacheError, match=message):
        opened.check(student_config(**changes), True, True)
