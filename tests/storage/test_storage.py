"""Folders on disks and at URLs: a real S3 server, connections that are cut, disks that fill."""

import hashlib
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.caches import assert_same, build_configs, make
from tests.fixtures.s3_server import BUCKET, s3_server
from tests.fixtures.worlds import CAPTIONS, make_world
from tinyflux.cache.dataset import CachedDataset
from tinyflux.cache.manifest import Manifest
from tinyflux.cache.verify import drop, unlisted, verify
from tinyflux.config import parse_run_config
from tinyflux.distributed.mirror import Mirror, working_copy
from tinyflux.distributed.weights import signature
from tinyflux.errors import CacheError, ConfigError, StorageError
from tinyflux.storage import copies, remote
from tinyflux.storage.copies import copy_of, fetch
from tinyflux.storage.remote import RemoteFolder, open_folder
from tinyflux.util.urls import join


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "log.txt") as found:
        yield found


@pytest.fixture
def s3(server, tmp_path, monkeypatch):
    """The URL of an empty folder, with the server's wire."""
    for name, value in server.environment(tmp_path / "local").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    place = {"local": str(tmp_path / "folder"), "memory": f"memory://{uuid.uuid4().hex}"}
    return open_folder(place.get(request.param) or request.getfixturevalue("s3"))


def test_a_folder_keeps_whole_files_by_path(folder):
    assert folder.list() == {}
    assert folder.names() == set()
    assert folder.size("a/b.txt") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a/b.txt")
    folder.write("a/b.txt", b"first")
    folder.write("a/b.txt", memoryview(b"second time"))
    folder.write("empty", b"")
    assert folder.read("a/b.txt") == b"second time"
    assert folder.list() == {"a/b.txt": 11, "empty": 0}
    assert folder.names() == {"a", "empty"}
    assert folder.list("a") == {"a/b.txt": 11}
    assert folder.list("none") == {}
    assert folder.size("a") is None
    folder.delete("a/b.txt")
    folder.delete("a/b.txt")
    assert folder.list() == {"empty": 0}


def test_a_cut_connection_is_tried_again_and_leaves_no_half_file(server, s3):
    folder, data = RemoteFolder(s3), bytes(range(256)) * 2**15
    folder.write("file", b"old")
    for after in (1_000, 4_000_000):
        server.wire.cut_after(after)
        before = server.wire.refused
        folder.write("file", data)
        assert server.wire.refused == before + 1
        server.wire.cut_after(after)
        assert folder.read("file") == data
        assert server.wire.refused == before + 2


def test_storage_that_stays_away_is_one_sentence_and_the_old_file_stays(server, s3, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 1)
    folder = RemoteFolder(s3)
    folder.write("file", b"old")
    server.wire.cut()
    try:
        with pytest.raises(StorageError, match="see that the storage can be reached"):
            folder.write("file", b"new")
    finally:
        server.wire.mend()
    assert folder.read("file") == b"old"


def test_what_cannot_help_is_not_tried_again(server, s3, tmp_path):
    with pytest.raises(StorageError, match="cannot write a"):
        RemoteFolder("s3://no-such-bucket/x").write("a", b"1")
    with pytest.raises(StorageError, match="cannot read none"):
        RemoteFolder(s3).download("none", tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be opened"):
        RemoteFolder("nosuch://bucket/x")
    with pytest.raises(StorageError, match="nothing at"):
        fetch(s3)


@pytest.mark.parametrize(
    "name", ["--run_dir", "--cache.path", "--data.folder", "--serve.checkpoint"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(name):
    with pytest.raises(ConfigError, match="holds a password") as caught:
        parse_run_config([name, "s3://somebody:hunter2@bucket/x"])
    assert "hunter2" not in str(caught.value)


def test_a_path_joins_before_the_options_of_a_url():
    assert join("s3://b/run?region=x", "final") == "s3://b/run/final?region=x"
    assert join("/runs/one", "final") == "/runs/one/final"


def test_copies_are_made_once_checked_and_bounded(server, s3, tmp_path, monkeypatch):
    folder = RemoteFolder(s3)
    pieces = [bytes([number]) * 2**20 for number in range(4)]
    for number, piece in enumerate(pieces):
        folder.write(str(number), piece)
    digests = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    monkeypatch.setenv("TINYFLUX_LOCAL_GIB", str(2.5 / 1024))
    monkeypatch.setattr(copies, "RECENT_SECONDS", 0.0)
    before = server.wire.carried
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(copy_of(folder, "0", 2**20, digests[0])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == pieces[0] for path in found] == [True] * 4
    assert 2**20 < server.wire.carried - before < 1.5 * 2**20
    for number in (1, 0, 2, 3):  # the first is used again, so the second makes room
        path = copy_of(folder, str(number), 2**20, digests[number])
    kept = {one.name for one in path.parent.iterdir()}
    assert kept == {digests[2], digests[3]}
    with pytest.raises(StorageError, match="is damaged"):
        copy_of(folder, "1", 2**20, digests[0])
    assert {one.name for one in path.parents[1].iterdir()} == {"files", "folders", "locks"}
    fetch(s3)  # 4 MiB: nothing else fits
    assert list(path.parent.iterdir()) == []
    monkeypatch.setattr(copies, "RECENT_SECONDS", 60.0)
    assert copy_of(folder, "0", 2**20, digests[0]).exists()
    assert len(list((path.parents[1] / "folders").iterdir())) == 1  # too new to go


def test_a_folder_that_changed_is_fetched_again(s3):
    folder = RemoteFolder(s3)
    folder.write("model.safetensors", b"one")
    folder.write("optimizer.safetensors", b"large")
    first = Path(fetch(s3, ("model.safetensors",)))
    assert [path.name for path in first.iterdir()] == ["model.safetensors"]
    assert fetch(s3, ("model.safetensors",)) == str(first)
    folder.write("model.safetensors", b"other")
    assert (Path(fetch(s3, ("model.safetensors",))) / "model.safetensors").read_bytes() == b"other"
    assert fetch("/a/path") == "/a/path"


def test_a_served_checkpoint_at_a_url_is_known_by_its_weights(s3):
    folder = RemoteFolder(s3)
    assert signature(s3) is None
    folder.write("model.safetensors", b"one")
    first = signature(s3)
    folder.write("config.json", b"{}")
    assert first is not None
    assert signature(s3) == first
    folder.write("model.safetensors", b"others")
    assert signature(s3) != first


def test_a_mirror_uploads_what_is_new_marks_last_and_prunes(s3, tmp_path, monkeypatch):
    folder, root = RemoteFolder(s3), tmp_path / "run"
    mirror = Mirror(folder, root, {"step": 2})
    folder.write("metrics.jsonl", b"from an earlier process\n")
    folder.write("drawn/00000.png", b"one of millions")
    for step in (1, 2, 3):
        for name in ("model.safetensors", "trainer_state.json"):
            folder.write(f"checkpoints/step_{step}/{name}", b"old")
    mirror.pull()
    assert [path.name for path in root.rglob("*")] == ["metrics.jsonl"]
    written: list[str] = []
    upload = RemoteFolder.upload

    def watched(self, source, path):
        written.append(path)
        upload(self, source, path)

    monkeypatch.setattr(RemoteFolder, "upload", watched)
    place = root / "checkpoints" / "step_4"
    (root / "final").mkdir()
    place.mkdir(parents=True)
    for name in ("a/trainer_state.json", "model.safetensors"):
        (place / Path(name).name).write_bytes(b"new")
    (root / "final" / "model.safetensors").write_bytes(b"new")
    (root / "final" / "training.json").write_bytes(b"{}")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "file").write_bytes(b"")
    with (root / "metrics.jsonl").open("a") as file:
        file.write("more\n")
    mirror.push()
    assert written == [
        "final/model.safetensors", "metrics.jsonl", "final/training.json",
        "checkpoints/step_4/model.safetensors", "checkpoints/step_4/trainer_state.json",
    ]  # fmt: skip
    steps = {path.split("/")[1] for path in folder.list("checkpoints")}
    assert steps == {"step_3", "step_4"}
    assert folder.read("metrics.jsonl") == b"from an earlier process\nmore\n"
    mirror.push()
    assert len(written) == 5
    with working_copy(s3) as copy:
        assert copy.name == s3.rsplit("/", 1)[1]
        (copy / "report.html").write_text("page")
        assert not (copy / "checkpoints").exists()
    assert folder.read("report.html") == b"page"
    assert not copy.exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def configs(tmp_path, world):
    return build_configs(tmp_path, world, CAPTIONS, rows_per_shard=2)


def test_a_cache_at_a_url_is_that_of_a_directory(server, s3, configs, capsys):
    make(configs)
    there = replace(configs, cache=replace(configs.cache, path=s3))
    server.wire.cut_after(30_000)
    make(there)
    assert server.wire.refused
    assert_same(s3, configs.cache.path)
    assert verify(there.store) == []
    before = {path: info.mtime_ns for path, info in there.store.infos().items()}
    assert before.keys() >= {"manifest.json", "build.json", "makers.json"}
    make(there)
    assert {path: info.mtime_ns for path, info in there.store.infos().items()} == before

    data = CachedDataset(s3)
    shard = data.manifest.shards[0].files["latents"]
    whole = there.store.read(shard.path)
    there.store.write(shard.path, whole[:-1] + bytes([whole[-1] ^ 1]))
    (problem,) = verify(there.store)
    assert "checksum" in problem.what
    drop(there.store, [problem])
    with pytest.raises(CacheError, match="missing"):
        CachedDataset(s3)
    make(there)
    assert there.store.read(shard.path) == whole
    assert list(unlisted(there.store)) == []
    there.store.write("shards/left.over.parquet", b"x")
    assert list(unlisted(there.store)) == [("shards/left.over.parquet", 1)]


def test_other_files_at_a_url_are_left_alone(s3, configs):
    there = replace(configs, cache=replace(configs.cache, path=s3))
    with pytest.raises(CacheError, match="there is no cache at"):
        Manifest.load(there.store)
    RemoteFolder(s3).write("thesis.tex", b"mine")
    with pytest.raises(CacheError, match="holds other files"):
        make(there)
