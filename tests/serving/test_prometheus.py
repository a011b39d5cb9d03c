"""The shipped Prometheus and Grafana files against a real Prometheus and real jobs.

Debian and Ubuntu have it: ``apt-get install prometheus``. Slow: a Ray, three jobs and a server.
"""

import json
import re
import shutil
import subprocess

import httpx
import pytest

from tests.fixtures import keeper
from tests.fixtures.ray_head import ROOT, running_cluster, succeed
from tests.fixtures.waiting import PATIENCE, answers, free_ports, wait_for
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.config import WorkersConfig
from tinyflux.serving.config import ServeConfig
from tinyflux.trainer.config import TrainerConfig

pytestmark = pytest.mark.slow
PROMETHEUS = shutil.which("prometheus")
# There is no GPU here, and no replica dies.
ABSENT = {"ray_node_gpus_utilization", "ray_tinyflux_serve_lost_replicas_total"}


def asked():
    """Every metric that the dashboard asks for."""
    board = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    return {name for query in queries for name in re.findall(r"ray_\w+", query)} - ABSENT


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not on the PATH")
def test_prometheus_gets_every_metric_of_the_dashboard(tmp_path):
    write_pictures(tmp_path / "pictures", [*CAPTIONS, *CAPTIONS, *CAPTIONS])
    make_world(tmp_path / "world")
    run = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(folder=str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(tmp_path / "world"),
        cache=CacheConfig(path=str(tmp_path / "cache"), rows_per_shard=4, cpus_per_actor=0.5),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, total_steps=200, save_every_steps=None,
            log_every=1, validate_every=20, val_fraction=0.3,
        ),
        workers=WorkersConfig(num_workers=1, cpus_per_worker=0.5),
        serve=ServeConfig(port=free_ports(1)[0], max_size=32, default_size=16),
    )  # fmt: skip
    save_run_config(run, tmp_path / "run.yaml")
    config = ("--config", str(tmp_path / "run.yaml"))
    with running_cluster(tmp_path / "head.log") as cluster:
        listed = cluster.folder / "prom_metrics_service_discovery.json"
        settings = (ROOT / "cluster" / "prometheus.yml").read_text()
        assert "/tmp/ray/prom_metrics_service_discovery.json" in settings
        settings = settings.replace("/tmp/ray/prom_metrics_service_discovery.json", str(listed))
        (tmp_path / "prometheus.yml").write_text(settings.replace("interval: 10s", "interval: 1s"))
        url = f"http://127.0.0.1:{free_ports(1)[0]}"
        prometheus = keeper.start(
            [str(PROMETHEUS), f"--config.file={tmp_path / 'prometheus.yml'}",
             f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={url[7:]}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def told():
            names = httpx.get(f"{url}/api/v1/label/__name__/values", timeout=5).json()
            return set(names["data"])

        try:
            wait_for(lambda: answers(f"{url}/-/ready"))
            succeed(cluster.start("ray_jobs/build_cache.py", *config))
            succeed(cluster.start("ray_jobs/train.py", *config))
            server = ("--no-wait", "--submission-id=server")
            succeed(cluster.start("ray_jobs/serve.py", *config, options=server))
            address = f"http://127.0.0.1:{run.serve.port}"
            wait_for(lambda: answers(f"{address}/readyz"))
            body = {"prompt": "red circle", "num_steps": 4, "width": 16, "height": 16,
                    "preview_every": 1}  # fmt: skip
            events = {"Accept": "text/event-stream"}
            answer = httpx.post(f"{address}/generate", json=body, headers=events, timeout=PATIENCE)
            assert "finished" in answer.text
            wait_for(lambda: asked() <= told())
            cluster.stop_job("server")
        finally:
            missing = asked() - told()
            prometheus.terminate()
            prometheus.wait(30)
    assert missing == set()
