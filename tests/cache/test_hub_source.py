"""Data sets on the Hub, read with the real huggingface_hub from a server that speaks its calls.

Slow: the command line builds twice, each time in a process that loads its models.
"""

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants
from PIL import Image

from tests.fixtures.caches import build_configs, changed, rows_by_key
from tests.fixtures.hub_server import running_hub
from tests.fixtures.ray_head import ROOT
from tests.fixtures.sources import CLEAN, FORMATS, MASK, PICTURES, encoded
from tests.fixtures.waiting import PATIENCE
from tests.fixtures.worlds import make_world
from tinyflux.cache.config import DataConfig
from tinyflux.cache.sources import list_splits, open_pictures, read_split
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.evaluation_sets import list_file_set
from tinyflux.errors import InputError
from tinyflux.evaluation.config import EvaluationSet
from tinyflux.storage.hub import pinned

TOKEN = "hf_" + "d" * 34
NAME = "someone/drawings"
URL = f"hf://datasets/{NAME}"


@pytest.fixture
def hub(monkeypatch):
    with running_hub(TOKEN) as (hub, address):
        # What HF_ENDPOINT sets, which huggingface_hub reads once.
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfFileSystem.clear_instance_cache()
        yield hub
    HfFileSystem.clear_instance_cache()


def drawing(colour):
    return encoded(Image.new("RGB", (16, 16), (colour, 9, 9)))


def as_the_hub_has_it(*colours):
    """A Parquet file of drawings, as ``datasets`` uploads it."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"image": {"bytes": drawing(colour), "path": f"{colour}.png"}, "text": f"drawing {colour}"}
        for colour in colours
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("image", image), ("text", pa.string())]))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def raws_of(data):
    return [raw for unit in list_splits(data) for raw in read_split(data, unit)]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_at_a_url_of_the_hub(hub, kind):
    hub.push(NAME, {"README.md": b"#", ".gitattributes": b"x", **FORMATS[kind]()}, "v1")
    data = DataConfig(pinned(f"{URL}@v1"), mask_key="mask", caption_lines=True)
    raws = raws_of(data)
    assert [raw.reason for raw in raws] == ["", "", ""]
    assert [raw.content for raw in raws] == list(PICTURES.values())
    assert [raw.captions for raw in raws] == list(CLEAN.values())
    assert list(open_pictures(data, [raws[2].locator])) == [PICTURES["c"]]
    assert list(open_pictures(data, [raws[0].mask_locator])) == [MASK]
    assert all(known for _, _, known in hub.calls)


@pytest.mark.parametrize("below", ["data", "data/train.parquet", "data/t*.parquet", "*/*.parquet"])
def test_a_folder_a_file_and_a_pattern_of_a_repository(hub, below):
    files = {"data/train.parquet": as_the_hub_has_it(1), "test.parquet": as_the_hub_has_it(2)}
    hub.push(NAME, files)
    (raw,) = raws_of(DataConfig(pinned(f"{URL}/{below}")))
    assert raw.captions == ("drawing 1",)


def test_a_commit_is_read_to_its_end_and_units_are_known_by_content(hub):
    files = {"a.parquet": as_the_hub_has_it(1, 2), "b.parquet": as_the_hub_has_it(3)}
    commit = hub.push(NAME, files)
    before = DataConfig(pinned(f"{URL}@main"))
    assert before.folder == f"{URL}@{commit}"
    assert pinned(before.folder) == before.folder
    units = {unit.digest for unit in list_splits(before)}
    other = as_the_hub_has_it(4)
    assert len(other) == len(files["b.parquet"])  # so its size does not tell
    hub.push(NAME, {**files, "b.parquet": other, "README.md": b"#"})
    after = DataConfig(pinned(URL))
    assert [raw.captions for raw in raws_of(before)][-1] == ("drawing 3",)
    assert [raw.captions for raw in raws_of(after)][-1] == ("drawing 4",)
    assert {unit.digest for unit in list_splits(before)} == units
    assert len({unit.digest for unit in list_splits(after)} & units) == 1


def test_what_cannot_be_opened_is_one_sentence(hub, monkeypatch):
    hub.push(NAME, {"a.parquet": as_the_hub_has_it(1)})

    def said(location):
        HfFileSystem.clear_instance_cache()
        with pytest.raises(InputError) as caught:
            list_splits(DataConfig(pinned(location)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "revision not found" in said(f"{URL}@nowhere")
    assert "repository not found" in said("hf://datasets/someone/else")
    assert "hf://datasets/drawings' cannot be opened" in said("hf://datasets/drawings")
    assert "does not exist: check the path" in said(f"{URL}/there/is/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "what is private or gated needs HF_TOKEN" in said(URL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in said(URL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in said(URL)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_hub_that_refuses_costs_no_picture(hub, kind):
    hub.push(NAME, FORMATS[kind]())
    data = DataConfig(pinned(URL))
    units, raws = list_splits(data), raws_of(data)
    hub.refused = True
    with pytest.raises(InputError, match=r"cannot be read now \(.*403"):
        list(read_split(data, units[0]))
    with pytest.raises(InputError, match=r"cannot be read now \(.*403"):
        list(open_pictures(data, [raws[0].locator]))


def test_a_set_to_evaluate_on_is_read_at_one_commit(hub):
    commit = hub.push(NAME, {"a.parquet": as_the_hub_has_it(1, 2)})
    chosen = EvaluationSet("drawings", f"{URL}/a.parquet")
    rows = list_file_set(chosen, None, 2)
    assert [row.caption for row in rows.rows] == ["drawing 1", "drawing 2"]
    assert rows.file == f"{URL}@{commit}/a.parquet"


@pytest.mark.slow
def test_a_cache_follows_what_is_committed_and_the_token_is_kept_nowhere(tmp_path):
    configs = build_configs(tmp_path, make_world(tmp_path / "world"), [], rows_per_shard=8)
    configs = changed(configs, data={"folder": URL})
    run = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=configs.data, zoo=configs.zoo, cache=configs.cache, model=configs.model,
    )  # fmt: skip
    save_run_config(run, tmp_path / "run.yaml")

    def build(**environment):
        return subprocess.run(
            [sys.executable, "-m", "tinyflux", "cache", "build", "--local",
             "--config", str(tmp_path / "run.yaml")],
            env={**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"),
                 "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), **environment},
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip

    with running_hub(TOKEN) as (hub, address):
        first = as_the_hub_has_it(1, 2, 3)
        hub.push(NAME, {"data/a.parquet": first})
        made = build(HF_ENDPOINT=address)
        assert made.returncode == 0, made.stderr
        captions = {caption for caption, _ in rows_by_key(configs.cache.path).values()}
        assert captions == {"drawing 1", "drawing 2", "drawing 3"}
        hub.push(NAME, {"data/a.parquet": first, "data/b.parquet": as_the_hub_has_it(4)})
        hub.calls.clear()
        again = build(HF_ENDPOINT=address)
        assert again.returncode == 0, again.stderr
        assert "computed 1 latents" in again.stdout
        assert len(rows_by_key(configs.cache.path)) == 4
        offline = build(HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "offline mode is enabled" in offline.stderr
    assert "Traceback" not in offline.stderr
    said = "".join(done.stdout + done.stderr for done in (made, again, offline))
    assert TOKEN not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
