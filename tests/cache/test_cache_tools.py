"""``tinyflux cache`` on datasets that are whole, and on damaged ones."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures.caches import CAPTIONS, assert_same, build_configs, changed, make
from tests.fixtures.worlds import make_world
from tinyflux.cache.build import estimate
from tinyflux.cache.claim import claim
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.estimate import ESTIMATE_NAME
from tinyflux.cache.manifest import Manifest, sha256
from tinyflux.cache.runner import LocalRunner
from tinyflux.cache.verify import drop, verify
from tinyflux.cli.main import run_job


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    configs = build_configs(folder, make_world(folder / "world"), CAPTIONS, rows_per_shard=4)
    make(configs)
    return configs


@pytest.fixture
def configs(built, tmp_path):
    """The built cache, to be damaged."""
    mine = changed(built, cache={"path": str(tmp_path / "cache")})
    shutil.copytree(built.store.directory, mine.store.directory)
    return mine


def files(configs, group):
    return [configs.store.directory / shard.files[group].path
            for shard in Manifest.load(configs.store).shards]  # fmt: skip


def flip(configs):
    path = files(configs, "lune")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(configs):
    os.truncate(files(configs, "sol")[1], 100)


def remove(configs):
    files(configs, "text")[0].unlink()


def remove_rows(configs):
    files(configs, "rows")[1].unlink()


def swap(configs):
    one, other = files(configs, "latents")[:2]
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(whole)


def spoil_null_text(configs):
    path = configs.store.directory / Manifest.load(configs.store).null_text.path
    path.write_bytes(path.read_bytes()[:-1] + b"?")


DAMAGES = {
    flip: "its checksum differs",
    cut: "has 100 bytes, not",
    remove: "is missing",
    remove_rows: "is missing",
    swap: "its checksum differs|bytes, not",
    spoil_null_text: "its checksum differs",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_mended(configs, built, damage):
    assert verify(configs.store) == []
    damage(configs)
    problems = verify(configs.store)
    assert problems
    assert all(re.search(DAMAGES[damage], problem.what) for problem in problems)
    drop(configs.store, problems)
    make(configs)
    assert verify(configs.store) == []
    assert_same(configs.store.directory, built.store.directory)


def relisted(configs, path):
    """The manifest with the true size and checksum of a file that was changed."""

    manifest = Manifest.load(configs.store)
    name = str(path.relative_to(configs.store.directory))

    def mended(file):
        if file.path != name:
            return file
        return dataclasses.replace(
            file, bytes=path.stat().st_size, sha256=sha256(path.read_bytes())
        )

    shards = [
        dataclasses.replace(s, files={group: mended(file) for group, file in s.files.items()})
        for s in manifest.shards
    ]
    dataclasses.replace(manifest, shards=tuple(shards)).save(configs.store)


def test_what_a_checksum_does_not_tell(configs):
    path = files(configs, "latents")[0]
    table = pq.read_table(path)
    pq.write_table(table.take(list(range(table.num_rows))[::-1]), path)
    relisted(configs, path)
    assert "another order" in verify(configs.store)[0].what

    path = files(configs, "lune")[1]
    layout = Manifest.load(configs.store).shards[1].files["lune"].columns["lune"]
    data = bytearray(path.read_bytes())
    data[layout.offset : layout.offset + 2] = np.float16("nan").tobytes()
    path.write_bytes(data)
    relisted(configs, path)
    assert "not finite" in verify(configs.store)[-1].what


def test_a_column_that_says_nothing_of_itself_is_a_problem_and_no_crash(configs):
    path = files(configs, "latents")[0]
    table = pq.read_table(path)
    plain = [pa.field(field.name, field.type, field.nullable) for field in table.schema]
    pq.write_table(table.cast(pa.schema(plain)), path)
    relisted(configs, path)
    (problem,) = verify(configs.store)
    assert problem.what == "column 'latents' has another shape or dtype than the manifest says"


def test_verify_and_gc_from_the_command_line(configs, capsys, tmp_path):
    path = str(configs.store.directory)
    assert run_job("cache", ["verify", path]) == 0
    assert "is whole" in capsys.readouterr().out
    kept = {p for p in configs.store.directory.rglob("*") if p.is_file()}
    other = make_world(tmp_path / "other", seed=1)
    make(changed(configs, zoo={"t5_repo": str(other / "t5")}))
    make(configs)
    assert run_job("cache", ["gc", path, "--dry-run"]) == 0
    assert "would free" in capsys.readouterr().out
    with claim(configs.store):
        assert run_job("cache", ["gc", path]) == 2
    assert run_job("cache", ["gc", path]) == 0
    assert {p for p in configs.store.directory.rglob("*") if p.is_file()} == kept
    assert run_job("cache", ["verify", path]) == 0
    flip(configs)
    assert run_job("cache", ["verify", path]) == 2
    assert "1 files of the cache" in capsys.readouterr().err
    assert run_job("cache", ["inspect", str(tmp_path / "nowhere")]) == 2


def test_inspect_shows_pictures(configs, capsys, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["inspect", str(configs.store.directory), "--html", str(page), "--samples", "5"]
    assert run_job("cache", [*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "12 rows in" in printed
    assert "latents of 4 x 4: 12 rows" in printed
    text = page.read_text()
    assert text.count("<figure>") == 5
    assert text.count("data:image/png") == 10
    assert CAPTIONS[0] in text


def test_export_is_read_by_others(configs, tmp_path, capsys):
    out = tmp_path / "plain"
    assert run_job("cache", ["export", str(configs.store.directory), str(out)]) == 0
    dataset = CachedDataset(configs.store.directory)
    rows = dataset.read(range(len(dataset)))
    table = pq.read_table(out)
    assert table["key"].to_pylist() == dataset.keys()
    assert table["caption"].to_pylist() == dataset.captions()
    for name, expected in rows.items():
        field = table.schema.field(name)
        assert json.loads(field.metadata[b"shape"]) == list(expected.shape[1:])
        found = np.stack(table[name].to_pylist()).reshape(expected.shape)
        assert np.array_equal(found, expected.numpy())
    frame = pd.read_parquet(out)
    assert np.array_equal(np.stack(frame["latents"]), rows["latents"].flatten(1).numpy())
    duckdb = pytest.importorskip("duckdb")
    ((count,),) = duckdb.sql(f"select count(*) from '{out}/*.parquet' where width = 16").fetchall()
    assert count == len(dataset)
    assert run_job("cache", ["export", str(configs.store.directory), str(out)]) == 2


def test_a_plan_comes_true(built, tmp_path, capsys):
    mine = changed(built, cache={"path": str(tmp_path / "cache"), "num_actors": 2})
    plan = estimate(mine, LocalRunner(mine))
    assert plan.samples == len(CAPTIONS)
    assert plan.actors == 2
    assert plan.cost.memory > 0
    assert "with 2 actors" in str(plan)
    assert "0.00 hours" not in str(plan)
    manifest = make(mine)
    assert "planned" in capsys.readouterr().out
    for group in ("latents", "text", "lune", "sol"):
        actual = sum(shard.files[group].bytes for shard in manifest.shards)
        assert plan.bytes(group) == pytest.approx(actual, rel=0.1), group
    assert_same(mine.store.directory, built.store.directory)
    assert ESTIMATE_NAME in {p.name for p in mine.store.directory.iterdir()}


def test_the_documented_example_reads_the_numbers(configs):
    page = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(example.replace("runs/demo/cache", str(configs.store.directory)), found)
    rows = CachedDataset(configs.store.directory).read(range(len(found["latents"])))
    assert np.array_equal(found["latents"], rows["latents"].numpy())
