"""A queue that lasts gets another replica; a server that nobody asks gives it back.

Slow: a Ray and a server of its own, and a second replica that imports torch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from tests.fixtures.deployment import deploy
from tests.fixtures.ray_head import ROOT, running_cluster
from tests.fixtures.serving_place import make_place
from tests.fixtures.waiting import PATIENCE, answers, free_ports, wait_for
from tests.fixtures.worlds import zoo_config
from tinyflux.config import RunConfig, save_run_config
from tinyflux.serving.config import ServeConfig

pytestmark = pytest.mark.slow
CALLERS = 6


def test_replicas_follow_the_queue(tmp_path):
    place = make_place(tmp_path)
    run = RunConfig(
        run_dir=str(place / "run"),
        zoo=zoo_config(place / "world"),
        serve=ServeConfig(
            checkpoint=str(place / "model"), cpus_per_replica=0.5, min_replicas=1, max_replicas=2,
            scale_up_seconds=1.0, scale_down_seconds=2.0, max_steps=1000, max_size=64,
            default_size=16, max_batch=2, max_queue=8, timeout_s=PATIENCE,
        ),
    )  # fmt: skip
    save_run_config(run, place / "run.yaml")
    port = free_ports(1)[0]
    config = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] = {"config": str(place / "run.yaml")}
    application["runtime_env"]["env_vars"] |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    (place / "serve.yaml").write_text(yaml.safe_dump(config))
    url, enough = f"http://127.0.0.1:{port}", threading.Event()
    with running_cluster(tmp_path / "head.log") as cluster:
        deploy(cluster.address, place / "serve.yaml")
        wait_for(lambda: answers(f"{url}/readyz"))

        def replicas():
            return len(cluster.processes(b"model-tinyflux"))

        def keep_asking(_):
            told = []
            body = {"prompt": "red circle", "num_steps": 100, "width": 16, "height": 16}
            with httpx.Client(timeout=PATIENCE) as http:
                while not enough.is_set():
                    told.append(http.post(f"{url}/generate", json=body).status_code)
            return told

        assert replicas() == 1
        with ThreadPoolExecutor(CALLERS) as pool:
            asked = [pool.submit(keep_asking, caller) for caller in range(CALLERS)]
            try:
                wait_for(lambda: replicas() == 2)
            finally:
                enough.set()
            told = [status for one in asked for status in one.result()]
        assert set(told) == {200}
        wait_for(lambda: replicas() == 1)
        assert answers(f"{url}/readyz")
