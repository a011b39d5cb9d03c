"""The HTTP side's parts that need no server."""

import asyncio
import subprocess
import sys
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse, PlainTextResponse

from ray_jobs.serve import app
from tinyflux.config import RunConfig, save_run_config
from tinyflux.errors import ConfigError
from tinyflux.model.config import ZooConfig
from tinyflux.serving.app import build_app, served_models
from tinyflux.serving.client import EngineClient
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.http.api import make_api
from tinyflux.serving.http.auth import check_exposure, read_keys
from tinyflux.serving.image_store import ImageStore
from tinyflux.serving.metrics import size_label
from tinyflux.serving.proxy import Outermost
from tinyflux.serving.registry import ReplicaRegistry
from tinyflux.serving.replica import signature

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


def answer_of(config, method, path, client="127.0.0.1", **request):
    """The answer to one request of a client at that address."""

    async def ask():
        api = make_api(EngineClient(config, {"a": None}, None))
        transport = httpx.ASGITransport(api, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, **request)

    return asyncio.run(ask())


def asked(config, client, path="/healthz"):
    """The status and the body of a GET by a client at that address."""
    answer = answer_of(config, "GET", path, client)
    return answer.status_code, answer.json()


def test_without_keys_only_this_machine_is_answered(key_file):
    assert asked(ServeConfig(), "127.0.0.1") == (200, {"status": "ok"})
    status, body = asked(ServeConfig(), "192.0.2.7")
    assert status == 403
    assert "its own machine only" in body["error"]["message"]
    assert asked(ServeConfig(allow_public=True), "192.0.2.7")[0] == 200
    assert asked(ServeConfig(api_keys_file=key_file), "192.0.2.7")[0] == 200
    assert asked(ServeConfig(api_keys_file=key_file), "127.0.0.1", "/v1/models")[0] == 401
    assert asked(ServeConfig(), "127.0.0.1", "/nowhere")[0] == 404


async def silent(scope, receive, send):
    """As Ray Serve's proxy when a replica has died before it answered."""


async def broken(scope, receive, send):
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a header")


@pytest.mark.parametrize(
    ("app", "path", "status", "part"),
    [
        (silent, "/", 503, "lost: try again"),
        (broken, "/", 500, "its log says how"),
        (PlainTextResponse("Path '/' not found. Ping", 404), "/", 404, "nothing is served"),
        (PlainTextResponse("no replica", 503), "/", 503, "nothing can answer now"),
        (PlainTextResponse("timed out", 408), "/", 408, "with status 408"),
        (JSONResponse({"a": 1}, 418), "/", 418, None),
        (PlainTextResponse("fine"), "/", 200, None),
        (PlainTextResponse("draining", 503), "/-/healthz", 503, None),
    ],
)
def test_a_proxys_own_errors_have_our_shape(app, path, status, part):
    async def ask():
        transport = httpx.ASGITransport(Outermost(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get(path)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    if part is None:
        assert answer.content == app.body
    else:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert part in error["message"]
        assert ("retry-after" in answer.headers) == (status == 503)


def test_what_clients_tell_ray_itself_does_not_reach_it():
    async def asked(*headers):
        async def app(scope, receive, send):
            await JSONResponse([name.decode() for name, _ in scope["headers"]])(
                scope, receive, send
            )

        transport = httpx.ASGITransport(Outermost(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/", headers=headers)).json()

    for name, value in (
        (b"X-Request-Disconnect-Disabled", b"1"),
        (b"X-Request-Timeout-Seconds", b"1"),
        (b"X-Request-ID", b"\xff"),
        (b"X-Request-ID", b"a" * 200),
        (b"Serve-Multiplexed-Model-ID", b"a"),
        (b"serve_multiplexed_model_id", b"a"),
        (b"X-Session-ID", b"a"),
        (b"x_session_id", b"a"),
    ):
        assert name.decode().lower() not in asyncio.run(asked((name, value)))
    assert "x-request-id" in asyncio.run(asked((b"X-Request-ID", b"a-b-c")))


def test_a_proxy_imports_nothing_heavy():
    script = "import sys, tinyflux.serving.proxy; print({'torch', 'ray'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


HERE = ("localhost", "LOCALHOST:8123", "127.0.0.1:8123", "[::1]", "[::1]:8123")
FOREIGN = ("evil.example", "evil.example:8123", "localhost.evil.example", "127.0.0.1.evil.example",
           "192.0.2.1", "[2001:db8::1]", "[::1", "", "a b", "\xff", "e" * 5000)  # fmt: skip


def test_only_names_of_this_machine_are_answered(key_file):
    def status(config, host, path="/"):
        return answer_of(config, "GET", path, headers={"Host": host.encode("latin-1")}).status_code

    assert [status(ServeConfig(), host) for host in HERE] == [200] * len(HERE)
    assert [status(ServeConfig(), host) for host in FOREIGN] == [421] * len(FOREIGN)
    assert status(ServeConfig(host="127.0.0.9"), "127.0.0.9:8123") == 200
    assert status(ServeConfig(), "10.0.0.7", "/healthz") == 200, "a probe's own address"
    refused = answer_of(ServeConfig(), "GET", "/", headers={"Host": "e" * 5000}).json()
    assert "serve.allowed_hosts" in refused["error"]["message"]
    assert len(refused["error"]["message"]) < 300

    own = ServeConfig(allowed_hosts=["draw.example.org", "*.example.net"])
    for host in (*HERE, "draw.example.org", "draw.example.org:443", "a.example.net"):
        assert status(own, host) == 200, host
    for host in ("example.org", "x.draw.example.org", "draw.example.org.evil.example"):
        assert status(own, host) == 421, host

    # Whoever has a key is no page that guesses a name, and who lets everyone draw means it.
    for config in (ServeConfig(api_keys_file=key_file), ServeConfig(allow_public=True)):
        assert status(config, "evil.example") == 200
    named = ServeConfig(api_keys_file=key_file, allowed_hosts=["draw.example.org"])
    assert status(named, "evil.example") == 421


def test_pages_of_others_cannot_post():
    def status(config, method="POST", **names):
        headers = {name: value.encode("latin-1") for name, value in names.items()}
        path = "/generate" if method == "POST" else "/"
        answer = answer_of(config, method, path, headers=headers, content=b"no JSON")
        return answer.status_code

    passed = 422  # the guard let it through to the body
    config = ServeConfig(allowed_hosts=["draw.example.org"])
    assert status(config) == passed, "no browser, no origin"
    for host, origin in (
        ("localhost:8123", "http://localhost:8123"),
        ("127.0.0.1:8123", "http://127.0.0.1:8123"),
        ("[::1]:8123", "http://[::1]:8123"),
        ("localhost:8123", "https://draw.example.org"),
    ):
        assert status(config, Host=host, Origin=origin) == passed, origin
    for origin in ("http://evil.example", "http://localhost:3000", "http://127.0.0.1:8123", "null",
                   "", "http://draw.example.org.evil.example", "\xff"):  # fmt: skip
        assert status(config, Host="localhost:8123", Origin=origin) == 403, origin
    assert status(config, "GET", Host="localhost:8123", Origin="http://evil.example") == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/openapi.json", "/page/app.js"])
def test_head_is_get_without_the_body(path):
    config = ServeConfig()
    get, head = (answer_of(config, method, path) for method in ("GET", "HEAD"))
    assert (head.status_code, head.headers) == (get.status_code, get.headers)
    assert head.content == b""


def test_head_has_no_other_rights_than_get(key_file):
    assert answer_of(ServeConfig(), "HEAD", "/nowhere").status_code == 404
    refused = answer_of(ServeConfig(), "HEAD", "/generate")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert answer_of(ServeConfig(), "DELETE", "/healthz").headers["allow"] == "GET, HEAD"
    keys = ServeConfig(api_keys_file=key_file)
    assert answer_of(keys, "HEAD", "/v1/models").status_code == 401


def test_a_body_that_stops_coming_is_not_waited_for():
    async def asks(config):
        first = {"type": "http.request", "body": b'{"prompt": "r', "more_body": True}
        answers, sent = [first], []

        async def receive():
            return answers.pop() if answers else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-length", b"30")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers,
                 "query_string": b"", "client": ("127.0.0.1", 5000)}  # fmt: skip
        await make_api(EngineClient(config, {"a": None}, None))(scope, receive, send)
        return sent

    start, body = asyncio.run(asks(ServeConfig(receive_seconds=0.05)))
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b"the body did not come within 0.05 s" in body["body"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_steps": 101}, r"serve\.default_steps 101 is over serve\.max_steps 100"),
        ({"max_steps": 5}, r"serve\.default_steps 28 is over serve\.max_steps 5"),
        ({"default_guidance": -1.0}, r"serve\.default_guidance must be from 0 to 100, not -1\.0"),
        ({"max_n": 0}, r"serve\.max_n must be 1 or more, not 0"),
        ({"max_body_bytes": 0}, r"serve\.max_body_bytes must be 1 or more"),
        ({"port": 70000}, r"serve\.port must be from 0 to 65535, not 70000"),
        ({"timeout_s": 0.0}, r"serve\.timeout_s must be above 0 and finite"),
        ({"receive_seconds": float("nan")}, r"serve\.receive_seconds must be above 0 and finite"),
        ({"allowed_hosts": ["http://a.example"]}, r"serve\.allowed_hosts: 'http://a\.example'"),
        ({"allowed_hosts": ["*"]}, r"serve\.allowed_hosts: '\*' cannot be a host"),
    ],
)
def test_a_config_that_would_refuse_everything_is_refused_itself(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_app(ServeConfig(checkpoint="runs/a", **settings), ZooConfig())


def test_ray_serves_own_command_refuses_such_a_config_too(tmp_path):
    save_run_config(RunConfig(run_dir=str(tmp_path)), tmp_path / "run.yaml")
    arguments = {"config": str(tmp_path / "run.yaml"), "serve.checkpoint": "runs/a"}
    with pytest.raises(ConfigError, match=r"serve\.default_steps 101 is over"):
        app({**arguments, "serve.default_steps": "101"})


def test_so_many_pictures_are_kept_for_so_long():
    def kept(store, count, pause=0.0):
        names = [store.keep(bytes([index])) for index in range(count)]
        time.sleep(pause)
        return names, [store.kept(name) for name in names]

    names, pictures = kept(ImageStore(2, 3600.0), 4)
    assert pictures == [None, None, b"\x02", b"\x03"]
    assert len(set(names)) == 4
    assert min(map(len, names)) >= 32
    assert kept(ImageStore(256, 0.01), 1, 0.05)[1] == [None]


def test_a_call_to_reload_reaches_every_replica_of_its_model():
    registry = ReplicaRegistry()
    assert registry.report("a", "a1", {}) is None
    registry.call_reload("a")
    after = [registry.report(*who, {}) for who in (("a", "a1"), ("a", "a2"), ("b", "b1"))]
    assert after[0] is not None
    assert after == [after[0], after[0], None]
    assert [said["replica"] for said in registry.present()] == ["a1", "a2", "b1"]


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
