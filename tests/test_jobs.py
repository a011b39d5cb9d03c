"""Every job through ``ray job submit`` on a Ray of its own."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.worlds import CAPTIONS, make_world, student_config, zoo_config

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

from tinyflux.cache.extract import CacheConfig
from tinyflux.cache.sources import DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.train import WorkersConfig
from tinyflux.serving.batch import SampleConfig
from tinyflux.serving.engine import ServeConfig
from tinyflux.trainer.config import TrainerConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# Whatever Ray the person at this machine uses is none of the test's business.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "RAY_AUTH_MODE": "disabled",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Jobs must find the package in the working directory that they were sent.
    "PYTHONPATH": "",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


class Cluster:
    """A Ray of one node, and its job command."""

    def __init__(self, folder: Path, log: Path):
        ports = free_ports(4)
        self.address = f"http://127.0.0.1:{ports[1]}"
        self._log = log
        self._commands: list[subprocess.Popen[str]] = []
        with log.open("w") as output:
            self._head = subprocess.Popen(
                [*RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
                 "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={ports[0]}",
                 f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
                 f"--ray-client-server-port={ports[3]}", f"--temp-dir={folder}",
                 "--object-store-memory=100000000"],
                env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until_up(self) -> None:
        def up() -> bool:
            assert self._head.poll() is None, self._log.read_text()
            return answers(f"{self.address}/api/jobs/")

        wait_for(up, 120)

    def start(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """``ray job submit`` as the README has it."""
        return self._job("submit", "--working-dir", ".", "--runtime-env", "runtime_env.yaml",
                         *options, "--", "python", *command)  # fmt: skip

    def stop_job(self, name: str) -> str:
        return finish(self._job("stop", name))[1]

    def _job(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        command = subprocess.Popen(
            [*RAY, "job", verb, "--address", self.address, *arguments],
            cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._commands.append(command)
        return command

    def end(self) -> None:
        for command in self._commands:
            command.kill()
            command.communicate()
        self._head.terminate()
        try:
            self._head.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._head.pid, signal.SIGKILL)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


def answers(url):
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def finish(process):
    """Exit status and everything printed."""
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def succeed(process):
    status, output = finish(process)
    assert status == 0, output
    return output


def picture_size(png):
    with Image.open(io.BytesIO(png)) as picture:
        return picture.size


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))  # sockets need a short path
    cluster = Cluster(folder, tmp_path_factory.mktemp("ray") / "head.log")
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run; its file is at ``<run_dir>.yaml``."""
    root = tmp_path_factory.mktemp("jobs")
    make_world(root / "world")
    (root / "pictures").mkdir()
    for index in range(12):
        picture = root / "pictures" / f"{index:02d}.png"
        Image.new("RGB", (16, 16), (index * 20, 250 - index * 20, 99)).save(picture)
        picture.with_suffix(".txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    run = RunConfig(
        run_dir=str(root / "run"),
        data=DataConfig(folder=str(root / "pictures"), height=16, width=16),
        zoo=zoo_config(root / "world"),
        cache=CacheConfig(path=str(root / "cache"), rows_per_shard=6),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=4, gradient_accumulation=1, total_steps=4, save_every_steps=2, log_every=1
        ),
        workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5),
        sample=SampleConfig(prompts=CAPTIONS[:2], num_steps=2, height=4, width=4),
        serve=ServeConfig(port=free_ports(1)[0], max_height=8, max_width=8),
    )
    save_run_config(run, f"{run.run_dir}.yaml")
    return run


def test_every_job_from_pictures_to_a_server(cluster, run):
    config = ("--config", f"{run.run_dir}.yaml")
    root = Path(run.run_dir)
    # Together, since most of a job's time is imports.
    here = cluster.start("-c", "import tinyflux; print(tinyflux.__file__)")
    mistaken = cluster.start("ray_jobs/train.py", *config, "--trainer.learning_rat", "1")
    succeed(cluster.start("ray_jobs/build_cache.py", *config))
    assert (Path(run.cache.path) / "manifest.json").exists()

    assert "working_dir_files" in succeed(here)
    status, output = finish(mistaken)
    assert status != 0
    assert "error: --trainer.learning_rat is not a setting (did you mean" in output
    assert "Traceback" not in output

    output = succeed(cluster.start("ray_jobs/train.py", *config))
    assert "step 4/4" in output
    assert (root / "final" / "model.safetensors").exists()
    assert [path.name for path in sorted((root / "checkpoints").iterdir())] == [
        "step_00000002",
        "step_00000004",
    ]

    server = ("--no-wait", "--submission-id=server")
    succeed(cluster.start("ray_jobs/serve.py", *config, options=server))
    succeed(cluster.start("ray_jobs/sample.py", *config))
    assert picture_size((root / "drawn" / "00001.png").read_bytes()) == (16, 16)

    address = f"http://127.0.0.1:{run.serve.port}"
    wait_for(lambda: answers(f"{address}/healthz"), 240)
    body = {"prompt": "red circle", "num_steps": 2, "width": 24, "height": 16}
    answer = httpx.post(f"{address}/generate", json=body, timeout=60)
    assert picture_size(answer.content) == (24, 16)
    assert "was stopped" in cluster.stop_job("server")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/healthz")
