"""``ray_jobs/serve.py`` as a process: it starts, is in time, and ends without cutting off.

Slow: the job starts a Ray and a server of four processes that import torch.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import httpx
import psutil
import pytest

from tests.fixtures import keeper
from tests.fixtures.ray_head import ENVIRONMENT, ROOT, Descendants, running_cluster
from tests.fixtures.serving_place import make_place
from tests.fixtures.students import write_adapter
from tests.fixtures.waiting import PATIENCE, answers, free_ports, wait_for
from tests.fixtures.worlds import zoo_config
from tinyflux.config import RunConfig, save_run_config
from tinyflux.serving.config import ServeConfig

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(place, environment):
    """The process, its address and its log; it has no keys, and five seconds for a picture."""
    make_place(place)
    adapter = write_adapter(str(place / "model"), place / "ink", seed=1)
    run = RunConfig(
        run_dir=str(place / "run"),
        zoo=zoo_config(place / "world"),
        serve=ServeConfig(
            port=free_ports(1)[0],
            checkpoint=str(place / "model"),
            adapters={"ink": adapter},
            max_steps=1000,
            max_size=128,
            default_size=16,
            timeout_s=5.0,
            log_prompts=True,
        ),
    )
    save_run_config(run, place / "run.yaml")
    with (place / "serve.log").open("w") as log:
        process = keeper.start(
            [sys.executable, "ray_jobs/serve.py", "--config", place / "run.yaml"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        url = f"http://127.0.0.1:{run.serve.port}"

        def up():
            assert process.poll() is None, (place / "serve.log").read_text()
            return answers(f"{url}/readyz")

        try:
            wait_for(up)
            yield process, url, place / "serve.log"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def job(tmp_path):
    with serving(tmp_path, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}) as running:
        yield running


@pytest.fixture
def guarded(tmp_path):
    """A server on a Ray of its own as a newcomer has it, which a token guards."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    del environment["RAY_AUTH_MODE"]
    with serving(tmp_path, environment) as (process, url, log):
        descendants = Descendants(process.pid)
        try:
            yield process, url, log, descendants
        finally:
            descendants.end()


@pytest.mark.fault
def test_a_server_ends_with_its_ray(guarded):
    process, url, log, descendants = guarded
    assert_guarded(descendants.alive())
    descendants.kill("ray::ServeController")
    descendants.kill("ray::ProxyActor")
    wait_for(lambda: answers(f"{url}/readyz"))  # such losses are made good
    assert process.poll() is None
    descendants.kill("raylet/raylet")
    assert process.wait(PATIENCE) > 0, log.read_text()
    assert descendants.alive() == []
    (said,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "Ray has died" in said


@pytest.mark.fault
def test_a_server_obeys_although_its_ray_is_dead(guarded):
    process, _, log, descendants = guarded
    descendants.kill("gcs/gcs_server")
    process.terminate()
    assert process.wait(PATIENCE) > 0, log.read_text()
    assert descendants.alive() == []


@pytest.mark.fault
def test_a_server_ends_with_its_cluster(tmp_path):
    with running_cluster(tmp_path / "head.log") as cluster:
        with serving(tmp_path, cluster.environment) as (process, _, log):
            cluster.kill_head()
            assert process.wait(PATIENCE) > 0
        (said,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert "Ray has died" in said


def assert_guarded(processes):
    """All listen on loopback, but a port of each replica, which wants the token."""
    addresses = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    addresses.add((one.laddr.ip.removeprefix("::ffff:"), one.laddr.port))
    assert len(addresses) > 10
    open_ports = [port for ip, port in addresses if ip not in ("127.0.0.1", "::1")]
    assert len(open_ports) <= 3, addresses  # the API, the model and what they share
    for port in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_job_keeps_its_time_and_draws_what_it_accepted_before_it_ends(job):
    process, url, log = job
    body = {"prompt": "red circle", "num_steps": 1000, "width": 128, "height": 128}
    started = time.monotonic()
    late = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert late.status_code == 503, late.text
    assert "not drawn within 5 s" in late.json()["error"]["message"]
    assert int(late.headers["retry-after"]) >= 1
    assert time.monotonic() - started < 20

    answer = httpx.post(f"{url}/admin/reload", json={})
    assert answer.status_code == 403
    assert "API keys" in answer.json()["error"]["message"]
    # Its Ray's proxies have what `tinyflux.serving.proxy` puts there; without, this is a 500.
    info = httpx.get(f"{url}/info", headers=[(b"x-session-id", b"\xff")])
    assert info.status_code == 200
    assert info.json()["adapters"] == ["ink"]
    pictures = [
        httpx.post(
            f"{url}/generate",
            json={"prompt": "red circle", "num_steps": 4, "seed": 1, "adapter": name},
            timeout=60,
        )
        for name in (None, "ink", "oil")
    ]
    assert [picture.status_code for picture in pictures] == [200, 200, 400]
    assert pictures[0].content != pictures[1].content
    assert "there is no adapter 'oil': ink" in pictures[2].json()["error"]["message"]

    said = []
    body = {"prompt": "red circle", "num_steps": 200}
    with httpx.Client(timeout=60) as http:
        asked = threading.Thread(
            target=lambda: said.append(http.post(f"{url}/generate", json=body).status_code)
        )
        asked.start()
        time.sleep(0.5)  # it is being drawn, and needs longer
        process.terminate()
        asked.join()
    assert said == [200]
    assert process.wait(PATIENCE) == 0
    assert "tinyflux draws 'red circle' (not '')" in log.read_text()  # as its config asks
    assert "(raylet)" not in log.read_text()  # no news of tasks that would be tried again
