"""Mirror images and crops: kept beside each picture, and nothing else changed by them."""

import json
import os
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.fixtures.caches import CAPTIONS, build_configs, changed, make
from tests.fixtures.worlds import make_world
from tinyflux.cache.build import estimate
from tinyflux.cache.config import MixSource, VariantsConfig
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.export import export
from tinyflux.cache.inspect import describe, write_page
from tinyflux.cache.manifest import MANIFEST_NAME, Manifest
from tinyflux.cache.runner import LocalRunner
from tinyflux.cache.schema import GROUPS
from tinyflux.cache.variants import Variant, variants_of
from tinyflux.cache.verify import drop, unlisted, verify
from tinyflux.config import RunConfig, parse_run_config
from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import StepReader, read_held_out
from tinyflux.distributed.config import ClusterConfig
from tinyflux.errors import ConfigError
from tinyflux.plan.cache import plan_cache

ALL = VariantsConfig(flips=True, crops=1)
NAMES = ("", "flip", "crop1", "crop1-flip")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Twelve pictures with masks, of which the cache keeps no variants."""
    folder = tmp_path_factory.mktemp("variants")
    configs = build_configs(folder, make_world(folder / "world"), CAPTIONS, rows_per_shard=4)
    for number, path in enumerate(sorted((folder / "pictures").glob("*.png"))):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 4 + number // 2, 16))  # two pictures each have the same mask
        mask.save(path.with_suffix(".mask.png"))
    configs = changed(configs, data={"mask_key": "mask"})
    make(configs)
    return configs


@pytest.fixture(scope="module")
def before(plain):
    return everything(plain)


@pytest.fixture(scope="module")
def varied(plain, before):
    """The same cache with its variants."""
    configs = changed(plain, data={"variants": ALL})
    make(configs)
    return configs


def everything(configs):
    """All files but the receipts and the manifest, whose seconds and lists differ."""
    files = configs.store.list()
    return {path: configs.store.read(path) for path in files if path.startswith("shards/")}


def read_variant(configs, number):
    dataset = CachedDataset(configs.cache.path)
    draws = np.full(len(dataset), (number + 0.5) / len(NAMES))
    return dataset.read(range(len(dataset)), draws=draws)


def test_which_variants_there_are():
    assert [variant.name for variant in variants_of(ALL)] == list(NAMES[1:])
    assert variants_of(VariantsConfig()) == []
    assert len(variants_of(VariantsConfig(True, 2))) == 5
    for variant in variants_of(VariantsConfig(True, 3)):
        assert Variant.named(variant.name) == variant


@given(
    whole=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    least=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_a_crop_lies_in_the_picture_and_has_the_shape_that_is_asked(whole, size, least, seed):
    config = VariantsConfig(crops=2, min_crop=least)
    left, top, right, bottom = Variant(1).box("ab", whole, size, config, seed)
    assert 0 <= left < right <= whole[0]
    assert 0 <= top < bottom <= whole[1]
    assert (right - left) * size[1] == pytest.approx((bottom - top) * size[0])
    largest = min(whole[0] / size[0], whole[1] / size[1])
    assert least * 0.999 <= (right - left) / size[0] / largest <= 1.001
    assert Variant(1, True).box("ab", whole, size, config, seed) == (left, top, right, bottom)


def test_what_was_there_stays_to_the_bit_and_text_is_kept_once(plain, before, varied):
    manifest = Manifest.load(varied.store)
    assert manifest.variants == NAMES
    pixels = ("latents", "mask", "lune", "sol")
    wanted = [
        "rows",
        *pixels,
        "text",
        *(f"{group}-{name}" for name in NAMES[1:] for group in pixels),
    ]
    assert sorted(manifest.groups) == sorted(wanted)
    after = everything(varied)
    assert before.items() <= after.items()
    receipts = [json.loads(varied.store.read(path)) for path in varied.store.list("receipts")]
    assert all(r["computed"] == r["rows"] for r in receipts if "mask" not in r["group"])
    assert len(receipts) == len(manifest.shards) * (len(wanted) - 1)
    assert verify(varied.store) == []


def test_without_variants_the_manifest_is_what_it_was(varied, plain, before, tmp_path):
    elsewhere = changed(plain, cache={"path": str(tmp_path / "cache")})
    first = make(elsewhere).to_json()
    make(changed(elsewhere, data={"variants": VariantsConfig(flips=True)}))
    assert make(elsewhere).to_json() == first
    assert elsewhere.store.read(MANIFEST_NAME) == first
    left = dict(unlisted(elsewhere.store))
    assert left
    assert all("-flip." in path for path in left)


def test_a_variant_is_what_the_models_make_of_that_picture(plain, varied, tmp_path):
    """The cache of mirrored pictures' own files has the latents and masks of ``flip``."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in sorted((varied.store.directory.parent / "pictures").iterdir()):
        if path.suffix == ".png":
            ImageOps.mirror(Image.open(path)).save(folder / path.name)
        else:
            (folder / path.name).write_text(path.read_text())
    mirrored = changed(
        plain, data={"folder": str(folder)}, cache={"path": str(tmp_path / "mirrored")}
    )
    make(mirrored)
    own, made = CachedDataset(mirrored.cache.path), CachedDataset(varied.cache.path)
    places = [own.captions().index(caption) for caption in made.captions()]
    expected, found = own.read(places), read_variant(varied, 1)
    for name in ("latents", "mask", "t5_embeds", "clip_pooled"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-3, msg=name)
    whole = read_variant(varied, 0)
    assert torch.equal(found["mask"], whole["mask"].flip(-1))
    for number in (1, 2, 3):
        other = read_variant(varied, number)
        assert torch.equal(other["t5_embeds"], whole["t5_embeds"])
        for name in ("latents", "lune", "sol_stats"):
            assert (other[name] != whole[name]).flatten(1).any(1).all(), name
    assert len({tuple(mask.flatten().tolist()) for mask in read_variant(varied, 2)["mask"]}) > 6
    plain_rows = made.read(range(len(made)))
    assert all(torch.equal(plain_rows[name], whole[name]) for name in whole)


def steps_of(data, count, samples_seen=0, world=1):
    """Each position's tensors, of ``count`` steps of ``world`` workers from ``samples_seen`` on."""
    reader = StepReader(data, data.held_out(0.2), 6, 2, seed=3)
    found = {}
    for rank in range(world):
        for step in islice(reader.steps(samples_seen, rank, world), count):
            for batch in step.micro_batches:
                for row, position in enumerate(batch.positions.tolist()):
                    found[position] = batch.latents[row], batch.clip_pooled[row], batch.lune[row]
    return found


def test_a_position_has_one_variant_whoever_reads_it(plain, varied):
    data = CacheMixture([MixSource(varied.cache.path)])
    alone = steps_of(data, 20)
    resumed = steps_of(data, 10, samples_seen=60)
    for world in (2, 3):
        together = steps_of(data, 20, world=world)
        assert together.keys() == alone.keys()
        for position, tensors in alone.items():
            assert all(map(torch.equal, tensors, together[position]))
            if position >= 60:
                assert all(map(torch.equal, tensors, resumed[position]))


def test_a_pass_is_over_the_pictures_and_every_variant_is_met(plain, varied, tmp_path):
    without = changed(plain, cache={"path": str(tmp_path / "cache")})
    make(without)
    data = CacheMixture([MixSource(varied.cache.path)])
    other = CacheMixture([MixSource(without.cache.path)])
    assert len(data) == len(other) == len(CAPTIONS)
    assert torch.equal(torch.from_numpy(data.held_out(0.2)), torch.from_numpy(other.held_out(0.2)))
    found, expected = steps_of(data, 40), steps_of(other, 40)
    for position, (_, text, _) in found.items():  # the captions tell that the rows are the same
        assert torch.equal(text, expected[position][1])
    whole = [read_variant(varied, number)["latents"].half() for number in range(len(NAMES))]
    met = [0] * len(NAMES)
    for latents, _, _ in found.values():
        (number,) = [
            at for at, rows in enumerate(whole) if (rows == latents).flatten(1).all(1).any()
        ]
        met[number] += 1
    assert sum(met) == 240
    assert all(30 < count < 90 for count in met)


def test_held_out_pictures_are_plain_and_mixed_caches_draw_their_own(varied, plain, tmp_path):
    without = changed(plain, cache={"path": str(tmp_path / "cache")})
    make(without)
    data = CacheMixture([MixSource(varied.cache.path)])
    other = CacheMixture([MixSource(without.cache.path)])
    chosen = data.held_out(0.4)
    held, expected = read_held_out(data, chosen), read_held_out(other, chosen)
    assert held.keys == expected.keys
    for one, two in zip(held.batches, expected.batches, strict=True):
        assert torch.equal(one.latents, two.latents)
    both = CacheMixture([MixSource(varied.cache.path), MixSource(without.cache.path)])
    rows, draws = [0, len(data), 1, len(data) + 1], np.array([0.3, 0.3, 0.9, 0.9])
    mixed = both.read(rows, draws=draws)
    flip, crop, whole = (read_variant(varied, number)["latents"] for number in (1, 3, 0))
    for found, wanted in zip(mixed["latents"], (flip[0], whole[0], crop[1], whole[1]), strict=True):
        assert torch.equal(found, wanted)


def test_a_damaged_variant_is_found_and_made_again(varied):
    held = everything(varied)
    shard = Manifest.load(varied.store).shards[1]
    os.truncate(varied.store.directory / shard.files["lune-crop1"].path, 100)
    problems = verify(varied.store)
    assert [problem.file for problem in problems] == [shard.files["lune-crop1"].path]
    drop(varied.store, problems)
    make(varied)
    assert verify(varied.store) == []
    assert everything(varied) == held


def test_tools_tell_and_write_variants(varied, tmp_path):
    said = describe(Manifest.load(varied.store))
    assert "variants of each picture: plain, flip, crop1, crop1-flip" in said
    assert "latents-crop1-flip: " in said
    export(varied.cache.path, tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    for number, name in enumerate(NAMES):
        column = table[f"latents-{name}" if name else "latents"].to_pylist()
        found = torch.tensor(np.stack(column)).float()
        assert torch.equal(found, read_variant(varied, number)["latents"].flatten(1))
    assert not [name for name in table.column_names if name.startswith("t5_embeds-")]
    write_page(varied.cache.path, tmp_path / "page.html", 2, "cpu")
    assert (tmp_path / "page.html").read_text().count("data:image/png") == 2 * (len(NAMES) + 1)


def test_plans_count_them(varied, tmp_path):
    mine = changed(varied, cache={"path": str(tmp_path / "cache")})
    measured = estimate(mine, LocalRunner(mine))
    assert "latents-crop1-flip" in str(measured)
    manifest = make(mine)
    for group in manifest.groups[1:]:
        actual = sum(shard.files[group].bytes for shard in manifest.shards)
        assert measured.bytes(group) == pytest.approx(actual, rel=0.1), group
    run = RunConfig(
        data=mine.data, zoo=mine.zoo, model=mine.model, cluster=ClusterConfig(samples=1000)
    )
    planned = plan_cache(run)
    assert planned.bytes["latents-flip"] == planned.bytes["latents"]
    assert "text-flip" not in planned.bytes
    run.data = changed(mine, data={"variants": VariantsConfig()}).data
    assert plan_cache(run).bytes_read == planned.bytes_read
    assert plan_cache(run).total_bytes < 0.5 * planned.total_bytes


def test_settings_of_variants():
    run = parse_run_config(["--data.variants.flips", "true", "--data.variants.crops", "2"])
    assert run.data.variants == VariantsConfig(flips=True, crops=2)
    with pytest.raises(ConfigError, match=r"data\.variants\.crops must not be negative"):
        VariantsConfig(crops=-1)
    with pytest.raises(ConfigError, match=r"at most 1, not 0 and 1\.5"):
        VariantsConfig(min_crop=1.5)
    assert set(GROUPS) == {"rows", "latents", "mask", "text", "lune", "sol"}
