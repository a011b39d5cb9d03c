"""One odd request costs only itself: the API in this process, over a real engine."""

import asyncio
import re
import threading
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import httpx
import pytest
import ray
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ray import serve
from ray.serve import context
from ray.serve._private.build_app import build_app
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.local_testing_mode import make_local_deployment_handle

from tests.fixtures.odd_requests import GOOD, VALUES, Address, addresses, body_of, odd_requests
from tests.fixtures.serving_place import make_place
from tests.fixtures.waiting import PATIENCE
from tests.fixtures.worlds import zoo_config
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.client import EngineClient
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.errors import ApiError
from tinyflux.serving.events import Accepted
from tinyflux.serving.http.api import make_api
from tinyflux.serving.http.native import GenerateBody, ReloadBody
from tinyflux.serving.http.openai import ImagesBody
from tinyflux.serving.replica import EngineReplica
from tinyflux.serving.shared import SharedState

# The replica's own threads draw from `random` (Ray Serve's request ids) while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[EngineClient]:
    place = make_place(tmp_path_factory.mktemp("odd"))
    config = ServeConfig(
        checkpoint=str(place / "model"), default_size=16, default_steps=2, default_guidance=2.0,
        max_steps=4, max_size=32,
    )  # fmt: skip
    zoo = zoo_config(place / "world")
    shared = serve.deployment(SharedState).options(name="shared").bind(config)
    replicas = []

    class Replica(EngineReplica):
        def __init__(self, *args):
            super().__init__(*args)
            replicas.append(self)

    replica = serve.deployment(Replica).options(name="model")
    engine = replica.bind(config, zoo, "tinyflux", config.checkpoint, shared)
    me = context.ReplicaContext(
        ReplicaID("here", DeploymentID("model", "tinyflux")), None, None, None, 1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "get_replica_context", lambda: me)  # there is none in threads
        # As `serve.run(_local_testing_mode=True)`: replicas are threads here, and no Ray is there.
        handles = build_app(
            engine, name="tinyflux", make_deployment_handle=make_local_deployment_handle
        ).deployment_handles
    yield EngineClient(config, {"tinyflux": handles["model"]}, handles["shared"])
    for made in replicas:
        made.__del__()  # as Ray Serve ends it
    # Else they draw while other modules' hypothesis does.
    for thread in (each for each in threading.enumerate() if each.name == "follower"):
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def api(client) -> FastAPI:
    return make_api(client)


def ask(api: FastAPI, request: httpx.Request) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(api, client=("127.0.0.1", 5000))
        async with httpx.AsyncClient(transport=transport) as http:
            return await http.send(request)

    return asyncio.run(asked())


def check_shape(answer: httpx.Response) -> None:
    """An answer is what was asked for, or an error as docs/serving.md has it."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) < 600, "an absurd value is not echoed whole"


def check_told(api: FastAPI, method: str, path: str, answer: httpx.Response) -> None:
    """The status is one that ``/openapi.json`` has for that address."""
    told = api.openapi()["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in told, f"{answer.status_code}: {answer.text}"


FIELDS = [
    *(("/generate", name) for name in GenerateBody.model_fields),
    *(("/admin/reload", name) for name in ReloadBody.model_fields),
    *(("/v1/images/generations", name) for name in ImagesBody.model_fields),
]


@pytest.mark.parametrize(("path", "field"), FIELDS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
@example(value='"\\udfff"')
@example(value='"red \\ud800 circle"')
@example(value="1" + "0" * 4000)
@example(value="1" + "0" * 5000)
@example(value="NaN")
@example(value="[" * 2000 + "]" * 2000)
def test_every_field_takes_whatever_is_sent(api, path, field, value):
    content = body_of({**GOOD, field: value} if path != "/admin/reload" else {field: value})
    request = httpx.Request("POST", f"http://localhost{path}", content=content, headers=JSON)
    answer = ask(api, request)
    check_shape(answer)
    check_told(api, "POST", path, answer)


# Beside what the schema knows.
PAGES = ("/", "/page/app.js", "/docs", "/openapi.json", "/static-offline-docs/{file}", "/{nowhere}")


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_address_takes_whatever_is_sent(api, data):
    known = [*addresses(api.openapi()), *(Address("GET", path) for path in PAGES)]
    address = data.draw(st.sampled_from(known), "address")
    odd = data.draw(odd_requests(address), "request")
    answer = ask(api, odd.build("http://localhost", {}))
    check_shape(answer)
    if address.path not in PAGES and "{" not in address.path:  # what stands there leads elsewhere
        check_told(api, address.method, address.path, answer)


def test_every_error_is_told_as_it_is(api):
    schema = api.openapi()
    for path, methods in schema["paths"].items():
        for method, says in methods.items():
            for status, response in says["responses"].items():
                if int(status) >= 400:
                    ref = response["content"]["application/json"]["schema"]["$ref"]
                    assert ref.endswith("/ErrorBody"), f"{method} {path} {status}"


def test_the_pages_say_which_addresses_need_a_key(client, tmp_path):
    (tmp_path / "keys").write_text("a-key-of-the-tests-0123456789\n")
    (tmp_path / "keys").chmod(0o600)
    guarded = copy(client)
    guarded.config = replace(client.config, api_keys_file=str(tmp_path / "keys"))
    api = make_api(guarded)
    for path, methods in api.openapi()["paths"].items():
        for method, says in methods.items():
            url = f"http://localhost{path.format(name='a', model='a')}"
            answer = ask(api, httpx.Request(method.upper(), url))
            assert ({} not in says["security"]) == (answer.status_code == 401), path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"prompt": "red circle", "negative_prompt": "\\udfff"}'),
        ("/generate", b'{"prompt": "red circle", "model": "\\udfff"}'),
        ("/generate", b'{"prompt": "red circle", "\\udfff": 1}'),
        ("/v1/images/generations", b'{"prompt": "red circle", "size": "\\udfff"}'),
        ("/v1/images/generations", b'{"prompt": "red circle", "user": "\\udfff"}'),
        ("/v1/images/generations", b'{"prompt": "red circle", "n": 1' + b"0" * 4000 + b"}"),
        ("/generate", b'{"prompt": "red circle", "height": 1' + b"0" * 4000 + b"}"),
        ("/admin/reload", b'{"model": "\\udfff"}'),
    ],
)
def test_what_cannot_be_encoded_or_drawn_is_refused_at_the_door(api, path, body):
    answer = ask(api, httpx.Request("POST", f"http://localhost{path}", content=body, headers=JSON))
    assert answer.status_code == 422, answer.text
    check_shape(answer)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/generate", "num_steps", "true"),
        ("/generate", "num_steps", '"2"'),
        ("/generate", "num_steps", "1.5"),
        ("/generate", "seed", "false"),
        ("/generate", "preview_every", '"0"'),
        ("/generate", "guidance_scale", "false"),
        ("/generate", "guidance_scale", '"3.0"'),
        ("/v1/images/generations", "guidance", "false"),
        ("/v1/images/generations", "partial_images", "false"),
        ("/v1/images/generations", "n", '"1"'),
        ("/v1/images/generations", "stream", '"no"'),
        ("/v1/images/generations", "stream", "0"),
    ],
)
def test_what_looks_like_a_number_is_none(api, path, field, value):
    content = body_of({**GOOD, field: value})
    answer = ask(
        api, httpx.Request("POST", f"http://localhost{path}", content=content, headers=JSON)
    )
    assert answer.status_code == 422, answer.text
    check_shape(answer)
    assert answer.json()["error"]["param"] == field


def test_a_whole_number_may_be_written_with_a_point(api):
    content = body_of({**GOOD, "seed": "3.0", "num_steps": "2.0", "guidance_scale": "3"})
    request = httpx.Request("POST", "http://localhost/generate", content=content, headers=JSON)
    answer = ask(api, request)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-seed"] == "3"


def test_the_schema_knows_which_sizes_there_can_be(api):
    size = api.openapi()["components"]["schemas"]["ImagesBody"]["properties"]["size"]
    for text in ("auto", "16x16", "24x8", "", "16", "16x", "0x16", "x16", "auto ", "a" * 200):
        content = body_of({**GOOD, "size": f'"{text}"'})
        url = "http://localhost/v1/images/generations"
        answer = ask(api, httpx.Request("POST", url, content=content, headers=JSON))
        known = re.search(size["pattern"], text) is not None
        assert answer.status_code == (200 if known else 400), answer.text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("red \ud800 circle", "the picture failed while"),  # the tokenizer cannot take it
        (5, "the server failed at this request"),  # the replica's own code cannot
    ],
)
def test_a_request_that_fails_by_itself_is_no_lost_replica(client, caplog, prompt, message):
    request = SampleRequest(prompt, "", 2, 2.0, 16, 16, 0)
    with pytest.raises(ApiError, match=message) as refused:
        asyncio.run(client.picture("tinyflux", request))
    assert refused.value.status == 500
    assert refused.value.retry_after is None, "another try would fail in the same way"
    assert "was lost" not in caplog.text
    good = SampleRequest("red circle", "", 2, 2.0, 16, 16, 0)
    assert asyncio.run(client.picture("tinyflux", good))
    assert not ray.is_initialized()


def test_a_streams_listener_is_told_of_what_fails_by_itself(client):
    async def told() -> list[object]:
        request = SampleRequest("red \ud800 circle", "", 2, 2.0, 16, 16, 0)
        events = client.draw("tinyflux", request)
        first = await anext(events)
        with pytest.raises(ApiError, match="the picture failed while"):
            await anext(events)
        return [first]

    assert asyncio.run(told()) == [Accepted()]
