import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.worlds import make_world, student_config, zoo_config
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import CacheConfig, Extractor
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.shards import ShardReader, write_null_text, write_shard
from tinyflux.cache.sources import DataConfig, decode_picture, list_sources, read_samples
from tinyflux.distributed.build import build_cache
from tinyflux.errors import CacheError, ConfigError, InputError
from tinyflux.trainer.cache_experts import EncodingCache

CAPTIONS = ["red circle", "blue square", "green heart", "a yellow star", "white moon"]


def write_pictures(folder: Path, size=(16, 16)) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for index, caption in enumerate(CAPTIONS):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


def data_config(folder) -> DataConfig:
    return DataConfig(str(folder), 16, 16)


@pytest.fixture(scope="module")
def columns(world, pictures):
    samples = read_samples(data_config(pictures), list_sources(data_config(pictures)))
    extractor = Extractor(zoo_config(world).build(student_config()), batch_size=2)
    return samples, extractor(samples), extractor


def write_dataset(directory: Path, columns, rows_per_shard=2) -> Path:
    samples, values, extractor = columns
    shards = []
    for start in range(0, len(samples), rows_per_shard):
        part = slice(start, start + rows_per_shard)
        cut = {name: value[part] for name, value in values.items()}
        keys = [sample.key for sample in samples[part]]
        shards.append(write_shard(directory, f"{start:05d}", keys, cut, trim_text=True))
    null = extractor.text([""], allow_empty=True)
    manifest = Manifest(
        rows=len(samples),
        recipe=extractor.recipe(),
        shards=tuple(shards),
        null_text=write_null_text(directory, null[0][0], null[1][0]),
    )
    manifest.save(directory)
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
    opened.verify()


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
    directory = tmp_path_factory.mktemp("shard")
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
    found = other(samples[::-1])
    for name in ("latents", "t5_embeds", "clip_pooled", "lune", "sol_stats", "sol_spatial"):
        torch.testing.assert_close(found[name].flip(0), values[name], rtol=2e-3, atol=2e-3)


def test_another_seed_gives_other_teacher_features(world, columns):
    samples, values, _ = columns
    other = Extractor(zoo_config(world).build(student_config()), seed=1, batch_size=2)(samples)
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


def test_a_build_leaves_other_peoples_directories_alone(tmp_path, pictures, world):
    def build(path):
        config = CacheConfig(str(path))
        build_cache(data_config(pictures), zoo_config(world), config, student_config())

    (tmp_path / "home" / "work").mkdir(parents=True)
    precious = tmp_path / "home" / "work" / ".mine.tmp"
    precious.write_text("not yours")
    with pytest.raises(CacheError, match="holds other files and no cache"):
        build(tmp_path / "home")
    assert precious.exists()
    assert len(list((tmp_path / "home").iterdir())) == 1

    EncodingCache(torch.ones(2, 4, 4, 4), torch.ones(2, 24, 16), torch.ones(2, 16)).save(
        str(tmp_path / "memory")
    )
    with pytest.raises(CacheError, match="no build job made"):
        build(tmp_path / "memory")


def test_more_rows_than_a_page_holds_are_refused():
    with pytest.raises(ConfigError, match="rows_per_shard must be at most"):
        CacheConfig(rows_per_shard=20000)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_every_mode_come_out_right():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    grey16 = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([1, 2, 3])
    assert decode_picture(encoded(clear), "a").getpixel((0, 0)) == (255, 255, 255)
    assert decode_picture(encoded(grey16), "b").getpixel((0, 0)) == (128, 128, 128)
    assert decode_picture(encoded(palette), "c").getpixel((0, 0)) == (1, 2, 3)
    see_through = decode_picture(encoded(palette, transparency=0), "d")
    assert see_through.getpixel((0, 0)) == (255, 255, 255)
    cmyk = decode_picture(encoded(Image.new("CMYK", (8, 8)), "JPEG"), "e")
    assert cmyk.getpixel((4, 4)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode_picture(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=turned), "f").size == (
        4,
        8,
    )


def test_a_header_of_absurd_size_is_refused_without_the_memory():
    data = bytearray(encoded(Image.new("L", (4, 4))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="'huge' is too large"):
        decode_picture(bytes(data), "huge")


def test_crop_covers_then_cuts_the_middle(tmp_path):
    folder = write_pictures(tmp_path / "pictures", size=(16, 32))
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    wide.save(folder / "0.png")
    data = DataConfig(str(folder), 16, 16, resize="crop")
    samples = read_samples(data, list_sources(data))
    assert {sample.image.size for sample in samples} == {(16, 16)}
    assert (samples[0].width, samples[0].height) == (48, 16)
    assert samples[0].image.getcolors() == [(256, (0, 0, 255))]


def test_metadata_jsonl_captions_pictures(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "3.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "a  pale star"}\n')
    found = [source.caption for source in list_sources(data_config(folder))]
    assert found == [*CAPTIONS[:3], "a pale star", CAPTIONS[4]]
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "none"}\n')
    with pytest.raises(InputError, match=r"lists '9\.png', which does not exist"):
        list_sources(data_config(folder))


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
    with pytest.raises(CacheError, match="checksum"):
        CachedDataset(dataset).verify()


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


def bad_folders():
    def no_pictures(folder):
        (folder / "a.txt").write_text("red")

    def no_captions(folder):
        write_pictures(folder / "in")
        for path in (folder / "in").glob("*.txt"):
            path.unlink()

    def html(folder):
        (folder / "a.png").write_bytes(b"<html>")
        (folder / "a.txt").write_text("red")

    def cut(folder):
        write_pictures(folder / "in")
        path = folder / "in" / "3.png"
        path.write_bytes(path.read_bytes()[:300])

    def empty_caption(folder):
        write_pictures(folder / "in")
        (folder / "in" / "1.txt").write_text(" \n")

    def other_size(folder):
        write_pictures(folder / "in", size=(16, 24))

    return [
        (no_pictures, "holds no pictures"),
        (no_captions, "have no caption"),
        (html, "is not a picture"),
        (cut, "broken"),
        (empty_caption, "is empty"),
        (other_size, "16 x 24 pixels, not 16 x 16: set data.resize=crop"),
    ]


@pytest.mark.parametrize(
    ("make", "message"), bad_folders(), ids=lambda v: getattr(v, "__name__", "")
)
def test_bad_folders_are_explained(tmp_path, make, message):
    make(tmp_path)
    data = data_config(tmp_path)
    with pytest.raises(InputError, match=message):
        read_samples(data, list_sources(data))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="not a folder that exists"):
        list_sources(data_config(tmp_path / "nowhere"))


BUILD = """
import sys
from pathlib import Path
from tests.test_cache import data_config
from tests.worlds import student_config, zoo_config
from tinyflux.cache.extract import CacheConfig
from tinyflux.distributed.build import build_cache
if __name__ == "__main__":
    pictures, world, out = map(Path, sys.argv[1:4])
    config = CacheConfig(str(out), num_actors=int(sys.argv[4]), rows_per_shard=1, batch_size=2)
    build_cache(data_config(pictures), zoo_config(world), config, student_config())
"""


def start_build(tmp_path, pictures, world, out, actors=1) -> subprocess.Popen:
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, str(script), str(pictures), str(world), str(out), str(actors)],
        env=environment,
        cwd=root,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_build_killed_in_the_middle_continues_to_the_same_dataset(
    tmp_path, pictures, world, columns
):
    out = tmp_path / "cache"
    process = start_build(tmp_path, pictures, world, out)
    deadline = time.monotonic() + 240
    while not list(out.glob("receipts/*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(CacheError, match="not finished"):
        CachedDataset(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("receipts/*.json")}

    assert start_build(tmp_path, pictures, world, out).wait(timeout=240) == 0
    opened = CachedDataset(out)
    opened.verify()
    assert opened.captions() == CAPTIONS
    # What was committed before the kill was kept, not made again.
    assert before
    for name, stamp in before.items():
        assert (out / "receipts" / name).stat().st_mtime_ns == stamp
    _, values, _ = columns
    for name, rows in opened.read(range(5)).items():
        torch.testing.assert_close(rows, values[name].float(), rtol=2e-3, atol=2e-3)

    other = CacheConfig(str(out), seed=5, rows_per_shard=1, batch_size=2)
    with pytest.raises(CacheError, match=r"cache\.seed = 0, this run has 5"):
        build_cache(data_config(pictures), zoo_config(world), other, student_config())


@pytest.mark.slow
def test_a_broken_picture_is_one_sentence_through_ray(tmp_path, pictures, world):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "2.png").write_bytes(b"nothing")
    process = subprocess.run(
        [sys.executable, "ray_jobs/build_cache.py", f"--data.folder={folder}", "--data.width=16",
         "--data.height=16", f"--cache.path={tmp_path / 'cache'}", "--zoo.device=cpu",
         f"--zoo.vae_repo={world}", f"--zoo.t5_repo={world / 't5'}", "--model.t5_layers=[0,1,2]",
         f"--zoo.clip_repo={world / 'clip'}", f"--zoo.experts_repo={world}",
         f"--zoo.sd_repo={world / 'sd'}"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert "2.png' is not a picture" in process.stderr.splitlines()[-1]
    assert not (tmp_path / "cache" / "manifest.json").exists()
