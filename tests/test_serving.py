import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from tests.worlds import make_world, student_config, zoo_config
from tinyflux.errors import InputError
from tinyflux.model.loader import save_model
from tinyflux.model.model import TinyFluxDeep
from tinyflux.serving.batch import SampleConfig, sample_prompts
from tinyflux.serving.engine import ImageEngine, ImageRequest, ServeConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A world and a student with open gates, so that prompt and seed show."""
    folder = tmp_path_factory.mktemp("serving")
    make_world(folder / "world")
    torch.manual_seed(0)
    model = TinyFluxDeep(student_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    save_model(model, folder / "model")
    return folder


@pytest.fixture(scope="module")
def engine(place):
    config = ServeConfig(checkpoint=str(place / "model"), max_steps=10, max_height=8, max_width=8)
    return ImageEngine(config, zoo_config(place / "world"))


def request(**changes) -> ImageRequest:
    values = {
        "prompt": "red circle",
        "negative_prompt": "",
        "num_steps": 2,
        "guidance_scale": 2.0,
        "height": 16,
        "width": 24,
        "seed": 3,
    }
    return ImageRequest(**{**values, **changes})


def test_a_request_gives_one_picture_of_its_size_and_seed(engine):
    png = engine.generate(request())
    assert Image.open(io.BytesIO(png)).size == (24, 16)
    assert engine.generate(request()) == png
    assert engine.generate(request(seed=4)) != png
    assert engine.generate(request(prompt="blue square")) != png


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 4096}, "multiple of 4 from 4 to 32 pixels, not 4096"),
        ({"height": 17}, "not 17"),
        ({"num_steps": 11}, "num_steps must be from 1 to 10"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "red " * 100}, "the limit is 24"),
        ({"prompt": "a" * 2000}, "2000 characters"),
    ],
)
def test_absurd_requests_are_refused(engine, changes, message):
    with pytest.raises(InputError, match=message):
        engine.generate(request(**changes))


def test_a_batch_of_prompts_is_drawn_once(place, tmp_path):
    config = SampleConfig(
        prompts=["red circle", "blue square", "red circle"],
        num_steps=2,
        height=4,
        width=4,
        checkpoint=str(place / "model"),
        output_dir=str(tmp_path / "out"),
        batch_size=2,
    )
    zoo = zoo_config(place / "world")
    assert sample_prompts(config, zoo).name == "grid.png"
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*.png")}
    assert len(files) == 3
    (tmp_path / "out" / "00001.png").unlink()
    sample_prompts(config, zoo)
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*.png")}
    assert [name for name in files if files[name] != again[name]] == ["00001.png"]
    config.prompts = []
    with pytest.raises(InputError, match="no prompts"):
        sample_prompts(config, zoo)


@pytest.fixture(scope="module")
def address(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = place / "world"
    log = (place / "serve.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "ray_jobs/serve.py", f"--serve.port={port}", "--serve.max_height=8",
         f"--serve.checkpoint={place / 'model'}", "--serve.max_width=8", "--zoo.device=cpu",
         f"--zoo.vae_repo={world}", f"--zoo.t5_repo={world / 't5'}",
         f"--zoo.clip_repo={world / 'clip'}", f"--zoo.experts_repo={world}",
         f"--zoo.sd_repo={world / 'sd'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    try:
        while True:
            assert server.poll() is None, (place / "serve.log").read_text()
            assert time.monotonic() < deadline, (place / "serve.log").read_text()
            try:
                if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url
        server.terminate()
        assert server.wait(timeout=120) == 0
    finally:
        log.close()
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.slow
def test_pictures_and_mistakes_over_http(address, engine):
    body = {"prompt": "red circle", "num_steps": 2, "width": 24, "height": 16, "seed": 3}
    answer = httpx.post(f"{address}/generate", json={**body, "guidance_scale": 2.0}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["x-seed"] == "3"
    assert answer.content == engine.generate(request())
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tinyflux"
    assert "/generate" in httpx.get(f"{address}/openapi.json").json()["paths"]

    for status, part, sent in (
        (422, "prompt", {"width": 24}),
        (422, "colour: is not a known field", {**body, "colour": "red"}),
        (422, "num_steps", {**body, "num_steps": "many"}),
        (400, "multiple of 4", {**body, "width": 99999}),
        (400, "the limit is 24", {**body, "prompt": "red " * 100}),
    ):
        answer = httpx.post(f"{address}/generate", json=sent, timeout=60)
        assert answer.status_code == status, answer.text
        assert part in answer.json()["error"]["message"]
    as_json = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/generate", content=b"{not json", headers=as_json)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the body is not valid JSON"
    answer = httpx.post(f"{address}/generate", json={"prompt": "a" * 100_000})
    assert answer.status_code == 413
