"""The server as people meet it: deployed by `serve deploy`, asked by real clients.

Slow: a Ray, and a server of five processes that import torch, for all tests of the module.
"""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from PIL import Image, ImageChops

from tests.fixtures.deployment import deploy
from tests.fixtures.ray_head import ROOT, running_cluster
from tests.fixtures.serving_place import make_place, save_student
from tests.fixtures.waiting import PATIENCE, answers, free_ports, wait_for
from tests.fixtures.worlds import zoo_config
from tinyflux.config import RunConfig, save_run_config
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.serving.proxy import HOOK

pytestmark = pytest.mark.slow

KEY = "a-key-of-the-tests-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}
MAX_QUEUE, MAX_BATCH = 3, 2
HTTP_REPLICAS = 2
RECEIVE_SECONDS = 3.0
LONG = 300  # steps: some seconds


class Server:
    def __init__(self, url, cluster, place):
        self.url, self.cluster, self.place = url, cluster, place
        self.http = httpx.Client(base_url=url, headers=BEARER, timeout=PATIENCE)

    def draw(self, **body):
        """One picture; the answer."""
        return self.http.post("/generate", json={"prompt": "red circle", **body})

    def metrics(self):
        return httpx.get(self.cluster.metrics, timeout=PATIENCE).text

    def replica(self, model="tinyflux"):
        """What the model's one replica last said of itself."""
        told = self.http.get("/admin/replicas").json()["replicas"]
        return next((one for one in told if one["model"] == model), None)

    def wait_until(self, condition):
        wait_for(lambda: (said := self.replica()) is not None and condition(said))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = make_place(tmp_path_factory.mktemp("http"))
    save_student(place / "other", seed=1)
    (place / "keys").write_text(f"# who: the tests\nanother-key-0123456789\n{KEY}\n")
    run = RunConfig(
        run_dir=str(place / "run"),
        zoo=zoo_config(place / "world"),
        serve=ServeConfig(
            checkpoint=str(place / "model"),
            models={"other": str(place / "other")},
            cpus_per_replica=0.5,
            http_replicas=HTTP_REPLICAS,
            watch_checkpoint=True,
            default_size=16,
            default_steps=2,
            default_guidance=2.0,
            max_steps=1000,
            max_size=64,
            max_batch=MAX_BATCH,
            max_queue=MAX_QUEUE,
            receive_seconds=RECEIVE_SECONDS,
        ),
    )
    save_run_config(run, place / "run.yaml")
    port = free_ports(1)[0]
    config = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] = {
        "config": str(place / "run.yaml"),
        "serve.api_keys_file": str(place / "keys"),
    }
    application["runtime_env"]["env_vars"] |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    (place / "serve.yaml").write_text(yaml.safe_dump(config))
    # Its proxies are asked to have our errors, and must find the package for that.
    proxies = {**HOOK, "PYTHONPATH": str(ROOT)}
    with running_cluster(place / "head.log", proxies) as cluster:
        deploy(cluster.address, place / "serve.yaml")
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/readyz"))  # four processes import torch
        server = Server(url, cluster, place)
        with server.http:
            yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def size_of(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.size


def same(png, other):
    """Whether two pictures are alike but for rounding: who shares a batch moves that."""
    with Image.open(io.BytesIO(png)) as one, Image.open(io.BytesIO(other)) as two:
        if one.size != two.size:
            return False
        return max(high for _, high in ImageChops.difference(one, two).getextrema()) <= 2


def events_of(answer):
    """Server-sent events as ``(event, data)``."""
    for block in "".join(answer.iter_text()).strip().split("\n\n"):
        first, second = block.split("\n")
        yield first.removeprefix("event: "), json.loads(second.removeprefix("data: "))


def test_a_picture_is_the_engines_own(server):
    body = {"num_steps": 2, "width": 24, "height": 16, "seed": 3, "solver": "heun"}
    answer = server.draw(**body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-seed"] == "3"
    config = ServeConfig(checkpoint=str(server.place / "model"), default_size=16)
    engine = open_engine(config, zoo_config(server.place / "world"))
    request = SampleRequest("red circle", "", guidance_scale=2.0, **body)
    assert same(answer.content, engine.generate(request))
    engine.close()


def test_openais_client_draws(server, client):
    assert [model.id for model in client.models.list()] == ["tinyflux", "other"]
    assert client.models.retrieve("other").id == "other"
    asked = {"prompt": "red circle", "size": "24x16", "extra_body": {"seed": 3, "steps": 2}}
    answer = client.images.generate(**asked, n=2, user="someone", response_format="b64_json")
    pngs = [base64.b64decode(picture.b64_json) for picture in answer.data]
    assert [size_of(png) for png in pngs] == [(24, 16)] * 2
    for png, seed in zip(pngs, (3, 4), strict=True):
        assert same(png, server.draw(num_steps=2, width=24, height=16, seed=seed).content)
    assert not same(*pngs)
    other = client.images.generate(**asked, model="other").data[0]
    assert not same(base64.b64decode(other.b64_json), pngs[0])

    kept = client.images.generate(**asked, response_format="url").data[0].url
    assert kept.startswith(server.url)
    for _ in range(6):  # whichever process answers; its name is its secret: no key is asked for
        assert same(httpx.get(kept).content, pngs[0])
    assert httpx.get(kept.replace(".png", "x.png")).status_code == 404


def test_openais_client_streams_partial_pictures(server, client):
    asked = {"prompt": "red circle", "extra_body": {"seed": 3, "steps": 8}}
    with client.images.generate(**asked, stream=True, partial_images=3) as stream:
        events = list(stream)
    kinds = ["partial_image"] * 3 + ["completed"]
    assert [event.type for event in events] == [f"image_generation.{kind}" for kind in kinds]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    last = base64.b64decode(events[-1].b64_json)
    assert same(last, server.draw(num_steps=8, seed=3).content)
    assert len({event.b64_json for event in events}) == 4


def test_openais_client_understands_refusals(server, client):
    with pytest.raises(openai.BadRequestError, match="multiple of 4"):
        client.images.generate(prompt="red circle", size="4096x4096")
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-9'"):
        client.images.generate(prompt="red circle", model="dall-e-9")
    with pytest.raises(openai.UnprocessableEntityError, match="prompt"):
        client.images.generate(prompt="")
    wrong = client.with_options(api_key="a-wrong-key-0123456789")
    with pytest.raises(openai.AuthenticationError, match="needs an API key"):
        wrong.images.generate(prompt="red circle")


def test_curl_draws(server, tmp_path):
    file, headers = tmp_path / "a.png", {**BEARER, "Content-Type": "application/json"}
    said = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    ask = ["curl", "-sS", "--fail-with-body", *said, "-d", '{"prompt": "red circle", "seed": 3}']
    subprocess.run([*ask, "-o", file, f"{server.url}/generate"], check=True, timeout=PATIENCE)
    assert same(file.read_bytes(), server.draw(seed=3).content)
    streamed = subprocess.run(
        [*ask, "-N", "-H", "Accept: text/event-stream", f"{server.url}/generate"],
        check=True, timeout=PATIENCE, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert [line for line in streamed.splitlines() if line.startswith("event")] == [
        "event: accepted",
        "event: step",
        "event: step",
        "event: finished",
    ]


def test_previews_come_while_it_draws(server):
    body = {"prompt": "red circle", "num_steps": 40, "preview_every": 10, "seed": 3}
    accept = {"Accept": "text/event-stream"}
    with server.http.stream("POST", "/generate", json=body, headers=accept) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(answer))
    steps = [data for event, data in events if event == "step"]
    assert [data["step"] for data in steps] == list(range(1, 41))
    previews = [data["step"] for data in steps if data["preview"]]
    assert previews[:3] == [10, 20, 30]
    assert size_of(base64.b64decode(steps[9]["preview"])) == (16, 16)
    last = base64.b64decode(events[-1][1]["image"])
    assert same(last, server.draw(num_steps=40, seed=3).content)


def test_an_answer_says_how_much_of_the_prompts_was_not_read(server, client):
    header, negative = "x-tinyflux-prompt-truncated", "x-tinyflux-negative-prompt-truncated"
    assert not {header, negative} & set(server.draw().headers)
    long, told = "red " * 100, {"clip": 70, "t5": 277}
    answer = server.draw(prompt=long, negative_prompt=long)
    assert answer.status_code == 200
    assert [answer.headers[name] for name in (header, negative)] == ["clip=70, t5=277"] * 2
    answer = client.images.with_raw_response.generate(prompt=long, n=2, size="16x16")
    assert answer.headers[header] == "clip=70, t5=277"
    assert negative not in answer.headers
    assert len(answer.parse().data) == 2

    accept = {"Accept": "text/event-stream"}
    with server.http.stream("POST", "/generate", json={"prompt": long}, headers=accept) as answer:
        *_, (event, data) = events_of(answer)
    assert (event, data["prompt_truncated"]) == ("finished", told)
    assert "negative_prompt_truncated" not in data
    with client.images.generate(prompt=long, size="16x16", stream=True) as events:
        *_, last = events
    assert last.type == "image_generation.completed"
    assert last.model_extra["prompt_truncated"] == told
    paths = server.http.get("/openapi.json").json()["paths"]
    for path in ("/generate", "/v1/images/generations"):
        documented = {name.lower() for name in paths[path]["post"]["responses"]["200"]["headers"]}
        assert documented == {header, negative}


@pytest.mark.parametrize(
    ("status", "part", "body"),
    [
        (422, "prompt: is missing", {}),
        (422, "colour: is not a known field", {"prompt": "red", "colour": "red"}),
        (422, "num_steps", {"prompt": "red", "num_steps": "many"}),
        (422, "solver", {"prompt": "red", "solver": "magic"}),
        (400, "num_steps must be from 1 to 1000", {"prompt": "red", "num_steps": 1001}),
        (400, "multiple of 4", {"prompt": "red", "width": 99999}),
        (400, "2000 characters", {"prompt": "a" * 2000}),
        (400, "not valid JSON", b"{not json"),
        (400, "body", b"\xff"),
        (400, "body", b"[" * 60_000),
        (413, "the limit is 65536", {"prompt": "a" * 100_000}),
        (411, "Content-Length", iter([b"{}"])),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(server, status, part, body):
    sent = {"json": body} if isinstance(body, dict) else {"content": body}
    answer = server.http.post("/generate", headers={"Content-Type": "application/json"}, **sent)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert part in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_only_who_has_a_key_may_draw(server):
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/info", "/admin/replicas", "/generate"):
            answer = httpx.get(f"{server.url}{path}", headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert httpx.get(f"{server.url}{path}").status_code == 200, path
    assert "/generate" in httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "://" not in httpx.get(f"{server.url}/docs").text  # nothing from elsewhere


def test_a_request_that_stops_half_way_is_answered_and_its_connection_closed(server):
    address = httpx.URL(server.url)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {address.netloc.decode()}\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
    with socket.create_connection((address.host, address.port), timeout=PATIENCE) as half:
        half.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt": "re'.encode())
        with half.makefile("rb") as answers:
            said = answers.read()  # up to the connection's end
    assert said.startswith(b"HTTP/1.1 408 "), said
    assert b"the body did not come within 3 s" in said


@pytest.mark.parametrize("path", ["/", "/healthz", "/info", "/v1/models/other", "/docs"])
def test_head_answers_where_get_does(server, path):
    get, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_half_characters_are_refused_at_once(server):
    for path in ("/generate", "/v1/images/generations"):
        body = b'{"prompt": "red circle", "negative_prompt": "\\udfff"}'
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert "surrogate" in answer.json()["error"]["message"]


def test_whoever_goes_away_frees_their_place(server):
    server.wait_until(lambda said: said["batch_size"] == 0)
    before = server.replica()["steps"]
    body = {"prompt": "red circle", "num_steps": 1000}
    accept = {"Accept": "text/event-stream"}
    with server.http.stream("POST", "/generate", json=body, headers=accept) as answer:
        assert next(answer.iter_text()).startswith("event: accepted")
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/generate", json=body, timeout=0.5)
    server.wait_until(lambda said: said["batch_size"] == said["queue_length"] == 0)
    assert server.replica()["steps"] - before < 1000


def test_a_flood_is_refused_while_what_was_accepted_is_drawn(server):
    with ThreadPoolExecutor(20) as pool:
        asked = list(pool.map(lambda seed: server.draw(num_steps=LONG, seed=seed), range(20)))
    drawn = [answer for answer in asked if answer.status_code == 200]
    refused = [answer for answer in asked if answer.status_code == 429]
    assert len(drawn) + len(refused) == 20
    assert len(drawn) >= MAX_QUEUE + 1
    assert refused
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert size_of(drawn[-1].content) == (16, 16)


def test_a_killed_replica_loses_no_picture(server):
    seeds = range(MAX_QUEUE + 1)
    expected = [server.draw(num_steps=LONG, seed=seed).content for seed in seeds]
    (before,) = server.cluster.processes(b"model-tinyflux")
    accept = {"Accept": "text/event-stream"}
    body = {"prompt": "red circle", "num_steps": LONG, "seed": 0, "preview_every": 10}

    def streamed():
        with server.http.stream("POST", "/generate", json=body, headers=accept) as answer:
            return list(events_of(answer))

    with ThreadPoolExecutor(8) as pool:
        stream = pool.submit(streamed)
        plain = [pool.submit(server.draw, num_steps=LONG, seed=seed) for seed in seeds[1:]]
        server.wait_until(lambda said: said["batch_size"] > 0)
        os.kill(before, signal.SIGKILL)
        answers = [each.result() for each in plain]
        events = stream.result()
    lost = sum(answer.status_code != 200 for answer in answers)
    assert lost == 0, [answer.text for answer in answers if answer.status_code != 200]
    for answer, png in zip(answers, expected[1:], strict=True):
        assert same(answer.content, png)
    # The stream goes on where it was: no step is told twice.
    steps = [data["step"] for event, data in events if event == "step"]
    assert steps == sorted(set(steps))
    assert steps[-1] == LONG
    assert same(base64.b64decode(events[-1][1]["image"]), expected[0])
    assert server.cluster.processes(b"model-tinyflux") != [before]
    wait_for(lambda: "tinyflux_serve_lost_replicas_total{" in server.metrics())


def test_a_killed_api_replica_ends_its_requests_with_an_error_as_any_other(server):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.draw, num_steps=1000, width=64, height=64)
        server.wait_until(lambda said: said["batch_size"] > 0)
        for process in server.cluster.processes(b":api"):
            os.kill(process, signal.SIGKILL)
        answer = asked.result()
    assert answer.status_code == 503, answer.text
    assert "was lost: try again" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    wait_for(lambda: len(server.cluster.processes(b":api")) == HTTP_REPLICAS)
    wait_for(lambda: server.draw(seed=3).status_code == 200)


def test_clients_give_ray_no_directions(server):
    odd = [
        (b"x-request-id", b"\xff"),
        (b"x-request-timeout-seconds", b"0.0001"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"x-session-id", b"\xff"),
    ]
    answer = server.http.post("/generate", json={"prompt": "red circle"}, headers=odd)
    assert answer.status_code == 200, answer.text


def test_a_newer_checkpoint_is_swapped_in_while_pictures_are_drawn(server):
    old = server.draw(seed=3).content
    wait_for(lambda: server.replica() is not None)
    save_student(server.place / "model", seed=2)
    statuses = []

    def changed():
        answer = server.draw(seed=3)
        statuses.append(answer.status_code)
        return not same(answer.content, old)

    wait_for(changed)
    assert set(statuses) == {200}
    server.wait_until(lambda said: said["reloads"] >= 1)  # it says so within a second
    reloads = server.replica()["reloads"]
    answer = server.http.post("/admin/reload", json={"model": "tinyflux"})
    assert (answer.status_code, answer.json()["status"]) == (202, "reloading")
    server.wait_until(lambda said: said["reloads"] > reloads)
    # One that cannot be read leaves the old one in place, and says so.
    (server.place / "model" / "model.safetensors").write_bytes(b"broken")
    server.wait_until(lambda said: "model.safetensors" in said["last_error"])
    assert server.draw(seed=3).status_code == 200
    answer = server.http.post("/admin/reload", json={"checkpoint": "/etc/passwd"})
    assert answer.status_code == 422


# Run as a driver: its request breaks the loop of the engine that draws it.
BREAK = """
import ray
from ray import serve
from tinyflux.inference.request import SampleRequest

class Breaks(int):
    def __rmod__(self, other):
        raise RuntimeError("the test breaks it")

ray.init(logging_level="ERROR")
handle = serve.get_deployment_handle("model-other", "tinyflux")
request = SampleRequest("red circle", "", 9, 2.0, 16, 16, 0, preview_every=Breaks(1))
print(list(handle.options(stream=True).draw.remote(request, False))[-1])
"""


def test_a_replica_whose_engine_broke_is_replaced_and_its_pictures_are_drawn(server):
    wait_for(lambda: server.replica("other") is not None)
    before = server.replica("other")["replica"]
    driver = subprocess.run(
        [sys.executable, "-c", BREAK], env=server.cluster.environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "the engine's loop broke: RuntimeError('the test breaks it')" in driver.stdout
    assert server.draw(model="other").status_code == 200
    wait_for(lambda: (server.replica("other") or {}).get("replica", before) != before)


def test_ray_has_the_figures(server):
    body = {"prompt": "red circle", "num_steps": 8, "preview_every": 2}
    missing = {
        *(f"ray_tinyflux_serve_{name}{{" for name in (
            "queue_length", "batch_size", "step_seconds", "cached_prompts", "steps_total",
        )),
        'tinyflux_serve_requests_total', 'route="/generate"', 'status="422"',
        'ray_tinyflux_serve_latency_seconds_bucket{',
        'ray_tinyflux_serve_first_preview_seconds_bucket{', 'size="16"',
    }  # fmt: skip

    # Ray sends a figure's changes once, loses them when its agent is slow to answer, and shows a
    # gauge for two reports only: on a busy machine no single page of figures need have them all.
    def asked_and_all_seen():
        assert server.draw(num_steps="many").status_code == 422
        drawn = server.http.post("/generate", json=body, headers={"Accept": "text/event-stream"})
        assert drawn.status_code == 200, drawn.text
        page = server.metrics()
        missing.difference_update([part for part in missing if part in page])
        return not missing

    try:
        wait_for(asked_and_all_seen)
    except AssertionError as error:
        raise AssertionError(f"Ray never showed {sorted(missing)}") from error


def test_prompts_and_keys_are_not_logged(server):
    server.draw(prompt="red heliotrope")
    folder = Path(server.cluster.folder)
    logs = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".log", ".err", ".out")
    ]
    assert any("POST /generate" in path.read_text(errors="replace") for path in logs)
    for path in logs:
        text = path.read_text(errors="replace")
        assert "heliotrope" not in text, path
        assert KEY not in text, path


def test_the_page_draws_in_a_real_browser(server, browser, tmp_path):
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    complaints, elsewhere = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda sent: (
            None if sent.url.startswith((server.url, "blob:")) else elsewhere.append(sent.url)
        ),
    )
    page.goto(server.url)
    error = page.locator("#error")
    error.wait_for()
    assert error.inner_text() == "This server needs an API key: type it below."
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.locator("#size option").first.wait_for(state="attached")
    error.wait_for(state="hidden")

    page.fill("#prompt", "red circle")
    page.fill("#steps", str(LONG))
    page.fill("#seed", "3")
    page.click("#draw")
    page.locator("#picture[alt^='Preview']").wait_for()  # before the picture is done
    assert page.locator("#gallery li").count() == 0
    page.locator("#gallery li").wait_for()
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 16
    assert "seed 3" in page.inner_text("#status")

    page.fill("#prompt", "blue square")
    page.fill("#steps", "2")
    page.press("#prompt", "Enter")
    page.locator("#gallery li").nth(1).wait_for()
    page.locator("#gallery button").nth(1).click()
    assert page.get_attribute("#picture", "alt") == "red circle"

    page.fill("#steps", "1000")
    page.press("#prompt", "Enter")
    page.locator("#stop").wait_for()
    page.keyboard.press("Escape")
    page.locator("#stop").wait_for(state="hidden")
    assert page.inner_text("#status") == "Stopped"

    page.fill("#prompt", "red " * 300)
    page.click("#draw")
    error.wait_for()
    assert "the limit is 1000" in error.inner_text()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()
    assert complaints == []
    assert elsewhere == []
