"""``ray_jobs/serve.py`` as a process: it starts, is in time, and ends without cutting off.

Slow: the job starts a Ray and a server of four processes that import torch.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.fixtures.ray_head import ENVIRONMENT, ROOT, answers, free_ports, wait_for
from tests.fixtures.serving_place import make_place
from tests.fixtures.worlds import zoo_config
from tinyflux.config import RunConfig, save_run_config
from tinyflux.serving.config import ServeConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def job(tmp_path):
    """The process, its address and its log; it has no keys, and five seconds for a picture."""
    place = make_place(tmp_path)
    run = RunConfig(
        run_dir=str(place / "run"),
        zoo=zoo_config(place / "world"),
        serve=ServeConfig(
            port=free_ports(1)[0],
            checkpoint=str(place / "model"),
            max_steps=1000,
            max_height=32,
            max_width=32,
            default_size=16,
            timeout_s=5.0,
            log_prompts=True,
        ),
    )
    save_run_config(run, place / "run.yaml")
    with (place / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "ray_jobs/serve.py", "--config", place / "run.yaml"],
            cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        url = f"http://127.0.0.1:{run.serve.port}"

        def up():
            assert process.poll() is None, (place / "serve.log").read_text()
            return answers(f"{url}/readyz")

        try:
            wait_for(up, 400)
            yield process, url, place / "serve.log"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


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
    assert process.wait(120) == 0
    assert "tinyflux draws 'red circle' (not '')" in log.read_text()  # as its config asks
