import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.worlds import make_world, student_config, zoo_config
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.extract import CacheConfig, Extractor
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.shards import write_null_text, write_shard
from tinyflux.cache.sources import DataConfig, list_sources, read_samples
from tinyflux.errors import CacheError, InputError

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
    pictures, world, out = map(Path, sys.argv[1:])
    config = CacheConfig(str(out), num_actors=1, rows_per_shard=1, batch_size=2)
    build_cache(data_config(pictures), zoo_config(world), config, student_config())
"""


def start_build(tmp_path, pictures, world, out) -> subprocess.Popen:
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, str(script), str(pictures), str(world), str(out)],
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

    from tinyflux.distributed.build import build_cache

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
