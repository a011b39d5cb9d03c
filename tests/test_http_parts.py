"""The HTTP side's parts that need no server."""

import asyncio

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import ConfigError
from tinyflux.model.zoo import ZooConfig
from tinyflux.serving.api import make_api
from tinyflux.serving.app import build_app, served_models
from tinyflux.serving.board import Board
from tinyflux.serving.engine import ServeConfig
from tinyflux.serving.keys import check_exposure, read_keys
from tinyflux.serving.metrics import size_label
from tinyflux.serving.painter import signature
from tinyflux.serving.studio import Studio

KEYS = ["first-key-0123456789", "second-key-0123456789"]


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n".join(["# ours", "", *KEYS]))
    return str(path)


def test_every_key_of_the_file_admits_and_nothing_else(key_file):
    keys = read_keys(key_file)
    assert all(keys.admit(f"Bearer {key}") for key in KEYS)
    assert keys.admit(f"bearer  {KEYS[0]} ")
    for wrong in ("", "Bearer", "Bearer ", f"Basic {KEYS[0]}", KEYS[0], "Bearer # ours",
                  f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}"):  # fmt: skip
        assert not keys.admit(wrong), wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("# none\n", "has no key"), ("short\n", "less than 16")],
)
def test_a_key_file_that_guards_nothing_is_refused(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_keys(str(path))


def test_the_network_is_served_with_keys_or_on_purpose_only(key_file):
    for config in (
        ServeConfig(),
        ServeConfig(host="::1"),
        ServeConfig(host="localhost"),
        ServeConfig(host="0.0.0.0", api_keys_file=key_file),
        ServeConfig(host="0.0.0.0", allow_public=True),
    ):
        check_exposure(config)
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(ConfigError, match=r"lets others in: set serve\.api_keys_file"):
            build_app(ServeConfig(host=host, checkpoint="runs/a"), ZooConfig())


def test_the_single_checkpoint_is_the_default_model():
    models = served_models(ServeConfig(checkpoint="a", models={"big": "b"}))
    assert list(models.items()) == [("tinyflux", "a"), ("big", "b")]
    with pytest.raises(ConfigError, match="nothing to serve"):
        served_models(ServeConfig())
    with pytest.raises(ConfigError, match="cannot be a name"):
        served_models(ServeConfig(models={"../b": "b"}))
    with pytest.raises(ConfigError, match=r"serve\.min_replicas 3"):
        build_app(ServeConfig(checkpoint="a", min_replicas=3), ZooConfig())
    for name in ("scale_up_seconds", "scale_down_seconds"):
        config = ServeConfig(checkpoint="a", max_replicas=2, **{name: -1.0})
        with pytest.raises(ConfigError, match=rf"serve\.{name} must be 0 or more, not -1\.0"):
            build_app(config, ZooConfig())


def asked(config, client, path="/healthz"):
    """The status and the body of a GET by a client at that address."""

    async def ask():
        api = make_api(Studio(config, {"a": None}, None))
        transport = httpx.ASGITransport(api, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            answer = await http.get(path)
        return answer.status_code, answer.json()

    return asyncio.run(ask())


def test_without_keys_only_this_machine_is_answered(key_file):
    assert asked(ServeConfig(), "127.0.0.1") == (200, {"status": "ok"})
    status, body = asked(ServeConfig(), "192.0.2.7")
    assert status == 403
    assert "its own machine only" in body["error"]["message"]
    assert asked(ServeConfig(allow_public=True), "192.0.2.7")[0] == 200
    assert asked(ServeConfig(api_keys_file=key_file), "192.0.2.7")[0] == 200
    assert asked(ServeConfig(api_keys_file=key_file), "127.0.0.1", "/v1/models")[0] == 401
    assert asked(ServeConfig(), "127.0.0.1", "/nowhere")[0] == 404


def test_the_board_keeps_so_many_pictures_for_so_long():
    async def kept(config, count, pause=0.0):
        board = Board(config)
        names = [await board.keep(bytes([index])) for index in range(count)]
        await asyncio.sleep(pause)
        return names, [await board.kept(name) for name in names]

    names, pictures = asyncio.run(kept(ServeConfig(keep_pictures=2), 4))
    assert pictures == [None, None, b"\x02", b"\x03"]
    assert len(set(names)) == 4
    assert min(map(len, names)) >= 32
    assert asyncio.run(kept(ServeConfig(keep_seconds=0.01), 1, 0.05))[1] == [None]


def test_a_call_to_reload_reaches_every_replica_of_its_model():
    async def told():
        board = Board(ServeConfig())
        before = await board.report("a", "a1", {})
        await board.call_reload("a")
        after = [await board.report(*who, {}) for who in (("a", "a1"), ("a", "a2"), ("b", "b1"))]
        return before, after, await board.present()

    before, after, present = asyncio.run(told())
    assert before is None
    assert after[0] is not None
    assert after == [after[0], after[0], None]
    assert [said["replica"] for said in present] == ["a1", "a2", "b1"]


def test_a_checkpoint_that_was_replaced_is_seen(tmp_path):
    assert signature(str(tmp_path)) is None
    assert signature(str(tmp_path / "none")) is None
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    old = signature(str(tmp_path))
    assert signature(str(tmp_path)) == old
    file.write_bytes(b"newer")
    assert signature(str(tmp_path)) != old


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_size_label_is_the_smallest_square_that_holds_the_area(height, width):
    side = int(size_label(height, width))
    assert side * side >= height * width
    assert side == 1 or (side / 2) ** 2 < height * width
