"""``ray up`` with the shipped file over real ssh to three hosts, a host lost in each stage.

As root: ``TINYFLUX_LAUNCH=1 pytest tests/distributed/test_launch.py -s``.

Slow: seven minutes on two cores,
most of which Ray takes to miss a host and to start on it again.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.fixtures import keeper
from tests.fixtures.hosts.machines import machines, why_not
from tests.fixtures.ray_head import ROOT, ray_processes, wait_for

pytest.importorskip("ray")
pytest.importorskip("deepspeed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.skipif(
        "TINYFLUX_LAUNCH" not in os.environ, reason="asked for by TINYFLUX_LAUNCH=1"
    ),
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts can be made: {why_not()}"),
]
DASHBOARD, SERVER = "http://127.0.0.1:8265", "http://127.0.0.1:8123"
PICTURES, STEPS = 48, 12


class Launch:
    """A launched cluster, as its user at the laptop has it."""

    def __init__(self, folder, hosts):
        self.folder, self.shared = folder, folder / "shared"
        self.laptop, *self.hosts = hosts
        self.shared.mkdir()
        self.file = folder / "cluster.yaml"
        self.token = secrets.token_hex(32)
        token = self.laptop.home / ".ray" / "auth_token"
        token.touch(mode=0o600)
        token.write_text(self.token)
        self.times = {}
        self._started = []

    def derive(self):
        """The shipped file, with these hosts' addresses and small sizes."""
        config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
        head, *workers = [host.address for host in self.hosts]
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"]["ssh_user"] = "root"
        # The hosts have the packages that this test runs with, and no registry.
        config["setup_commands"] = [
            command for command in config["setup_commands"] if "pip install" not in command
        ]
        small = "ray start --num-cpus=1 --object-store-memory=100000000"
        for kind in ("head_start_ray_commands", "worker_start_ray_commands"):
            config[kind] = [command.replace("ray start", small) for command in config[kind]]
        self.file.write_text(yaml.safe_dump(config))

    def start(self, *words):
        """A command, at the laptop."""
        output = self.folder / f"{len(self._started):02d}.log"
        with output.open("w") as stream:
            process = keeper.start(
                self.laptop.command(*words),
                stdout=stream, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        process.output = output
        self._started.append(process)
        return process

    def finish(self, process, seconds=400):
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "still running"
        text = process.output.read_text()
        assert status == 0, text[-6000:]
        return text

    def run(self, *words):
        return self.finish(self.start(*words))

    def timed(self, what, *words):
        begun = time.monotonic()
        self.run(*words)
        self.note(what, begun)

    def note(self, what, begun):
        self.times[what] = round(time.monotonic() - begun, 1)
        print(f"{what}: {self.times[what]} s", flush=True)

    def nodes(self):
        """How many nodes are alive."""
        listed = self.start("curl", "-sf", "-H", f"Authorization: Bearer {self.token}",
                            f"{DASHBOARD}/nodes?view=summary")  # fmt: skip
        if listed.wait(30) != 0:
            return 0
        summary = json.loads(listed.output.read_text())["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def submit(self, *words, options=()):
        return self.start("ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".",
                          *options, "--", "python", *words)  # fmt: skip

    def with_process(self, name):
        """The hosts that run Ray's processes of this name."""
        return [host for host in self.hosts if ray_processes(host.pid, name)]

    def titles(self):
        """Every Ray process of the hosts."""
        pids = [pid for host in self.hosts for pid in ray_processes(host.pid, b"")]
        found = []
        for pid in pids:
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())
        return found

    def end(self):
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def launch():
    folder = Path(tempfile.mkdtemp(prefix="tinyflux-launch-", dir="/var/tmp"))
    with machines(folder, ["laptop", "one", "two", "three"]) as hosts:
        launch = Launch(folder, hosts)
        try:
            yield launch
        finally:
            launch.end()
    shutil.rmtree(folder, ignore_errors=True)


def write_run(launch):
    """Pictures, world and run file in the folder that all hosts see."""
    shared = launch.shared
    launch.run(
        "python", "-m", "tinyflux", "toy", "icons", f"{shared}/pictures", "--demo", "--files"
    )
    launch.run("python", "-m", "tinyflux", "toy", "world", f"{shared}/world")
    for extra in sorted((shared / "pictures").rglob("*.png"))[PICTURES:]:
        extra.unlink()
        extra.with_suffix(".txt").unlink()
    demo = yaml.safe_load(
        (ROOT / "configs" / "demo.yaml").read_text().replace("runs/demo", str(shared))
    )
    demo["data"]["folder"] = str(shared / "pictures")
    demo["run_dir"] = str(shared / "run")
    demo["cache"] |= {"num_actors": 3, "batch_size": 2, "rows_per_shard": 2}
    demo["trainer"] |= {"total_steps": STEPS, "batch_size": 8, "log_every": 1, "sample_every": None,
                        "save_every_steps": 2, "validate_every": None}  # fmt: skip
    demo["workers"] |= {"num_workers": 2, "cpus_per_worker": 1}
    path = shared / "run.yaml"
    path.write_text(yaml.safe_dump(demo))
    return path


def test_a_cluster_from_ray_up_to_ray_down_outlives_its_hosts(launch):
    launch.derive()
    config = ("--config", str(write_run(launch)))
    launch.timed("ray up", "ray", "up", "--yes", "--no-config-cache", str(launch.file))
    tunnel = ("ssh", "-N", "-o", "StrictHostKeyChecking=no", "-o", "ExitOnForwardFailure=yes",
              "-L", "8265:127.0.0.1:8265", "-L", "8123:127.0.0.1:8123",
              f"root@{launch.hosts[0].address}")  # fmt: skip
    launch.start(*tunnel)
    begun = time.monotonic()
    wait_for(lambda: launch.nodes() == 3, 180)
    launch.note("all three nodes after ray up", begun)

    # Nobody gets in without the token, nor from outside the head even with it.
    code = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}")
    assert launch.run(*code, f"{DASHBOARD}/api/jobs/") == "401"
    assert launch.run(*code, "-H", "Authorization: Bearer no", f"{DASHBOARD}/api/jobs/") == "403"
    outside = launch.start("curl", "-s", "-m", "5", f"http://{launch.hosts[0].address}:8265/")
    assert outside.wait(20) == 7  # connection refused

    # The cache, on all three hosts; one dies.
    begun = time.monotonic()
    job = launch.submit("ray_jobs/build_cache.py", *config)
    receipts = launch.shared / "cache" / "receipts"

    def done():
        return len(list(receipts.glob("*.json")))

    wait_for(lambda: done() >= 2 or job.poll() is not None, 240)
    assert len(launch.with_process(b"ShardActor")) == 3
    launch.hosts[2].die()
    killed, before = time.monotonic(), done()
    assert job.poll() is None, launch.finish(job)
    wait_for(lambda: done() > before or job.poll() is not None, 120)
    launch.note("cache: next shard after a host died", killed)
    launch.finish(job)
    launch.note("cache: rest of the job after a host died", killed)
    launch.note("cache: whole job", begun)
    assert json.loads((launch.shared / "cache" / "manifest.json").read_text())["rows"] == PICTURES

    # The host comes back, and with it its node.
    wait_for(lambda: launch.nodes() == 2, 120)
    launch.hosts[2].boot()
    begun = time.monotonic()
    launch.run("ray", "up", "--yes", "--no-config-cache", "--no-restart", str(launch.file))
    wait_for(lambda: launch.nodes() == 3, 240)
    launch.note("node back after its host booted", begun)

    # Training, on two hosts; one dies.
    begun = time.monotonic()
    job = launch.submit("ray_jobs/train.py", *config)
    checkpoints = launch.shared / "run" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("step_*4")) or job.poll() is not None, 300)
    training = launch.with_process(b"TrainWorker")
    assert len(training) == 2, launch.finish(job)
    assert job.poll() is None
    victim = training[-1]
    assert victim is not launch.hosts[0]
    victim.die()
    killed = time.monotonic()
    wait_for(lambda: list(checkpoints.glob("step_*8")) or job.poll() is not None, 300)
    launch.note("training: four more steps after a host died", killed)
    output = launch.finish(job)
    launch.note("training: whole job", begun)
    assert f"step {STEPS}/{STEPS}" in output
    assert (launch.shared / "run" / "final" / "model.safetensors").exists()

    # A server, asked from another host through a tunnel.
    begun = time.monotonic()
    launch.run("ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--no-wait",
               "--submission-id=server", "--", "python", "ray_jobs/serve.py", *config)  # fmt: skip
    picture = launch.folder / "apple.png"
    ask = ("curl", "-sf", "-o", str(picture), "-H", "Content-Type: application/json", "-d",
           '{"prompt": "red apple", "num_steps": 2, "width": 32, "height": 32}',
           f"{SERVER}/generate")  # fmt: skip
    wait_for(lambda: launch.start(*ask).wait(60) == 0, 240)
    launch.note("first picture after the server's submission", begun)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "was stopped" in launch.run("ray", "job", "stop", "--address", DASHBOARD, "server")

    # The token is in the owners' files, and nowhere else.
    jobs = launch.run("curl", "-sf", "-H", f"Authorization: Bearer {launch.token}",
                      f"{DASHBOARD}/api/jobs/")  # fmt: skip
    assert launch.token not in jobs
    holders = [path for path in launch.folder.rglob("*")
               if path.is_file() and not path.is_symlink()
               and launch.token.encode() in path.read_bytes()]  # fmt: skip
    assert {path.name for path in holders} == {"auth_token"}
    assert {path.stat().st_mode & 0o777 for path in holders} == {0o600}

    launch.timed("ray down", "ray", "down", "--yes", str(launch.file))
    assert not ray_processes(launch.hosts[0].pid, b"")
    # The others end by themselves when they have not heard of the head for a while.
    begun = time.monotonic()
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not launch.titles(), 240)
    assert launch.titles() == []
    launch.note("the last process after ray down", begun)
