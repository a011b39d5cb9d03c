"""A Ray of one node for tests that kill things or submit jobs."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.waiting import PATIENCE, answers, free_ports, wait_for

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# Whatever Ray the person at this machine uses is none of the test's business.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    "RAY_AUTH_MODE": "disabled",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # as the nodes of cluster/ have it
    "RAY_metrics_report_interval_ms": "1000",
    # Jobs must find the package in the working directory that they were sent.
    "PYTHONPATH": "",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


class Cluster:
    """A Ray of one node, and its job command."""

    def __init__(self, folder: Path, log: Path, extra: dict[str, str]):
        ports = free_ports(5)
        self.metrics = f"http://127.0.0.1:{ports[4]}/metrics"
        self.address = f"http://127.0.0.1:{ports[1]}"
        # For a driver that is started by hand.
        self.environment = {
            **ENVIRONMENT, **extra, "RAY_ADDRESS": f"127.0.0.1:{ports[0]}", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        self.folder, self._log = folder, log
        self._commands: list[subprocess.Popen[str]] = []
        with log.open("w") as output:
            self._head = subprocess.Popen(
                [*RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
                 "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={ports[0]}",
                 f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
                 f"--ray-client-server-port={ports[3]}", f"--metrics-export-port={ports[4]}",
                 f"--temp-dir={folder}",
                 "--object-store-memory=100000000"],
                env={**ENVIRONMENT, **extra}, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait_until_up(self) -> None:
        def up() -> bool:
            assert self._head.poll() is None, self._log.read_text()
            # Processes that start 30 s before the agent that takes their figures send none, ever.
            return answers(f"{self.address}/api/jobs/") and answers(self.metrics)

        wait_for(up)

    def start(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """``ray job submit`` as for nodes that have the packages."""
        return self._job("submit", "--working-dir", ".", *options, "--", "python", *command)

    def processes(self, name: bytes) -> list[int]:
        """Ray's processes of this node with ``name`` in their titles."""
        return ray_processes(self._head.pid, name)

    def stop_job(self, name: str) -> str:
        return finish(self._job("stop", name))[1]

    def _job(self, verb: str, *arguments: str) -> subprocess.Popen[str]:
        command = subprocess.Popen(
            [*RAY, "job", verb, "--address", self.address, *arguments],
            cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._commands.append(command)
        return command

    def kill_head(self) -> None:
        """Let the head's processes be gone at once; workers of the node may live on."""
        os.killpg(self._head.pid, signal.SIGKILL)
        self._head.wait()

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


class Nodes:
    """A cluster of several nodes on this machine, whose head does no work."""

    def __init__(self, environment: dict[str, str]):
        from ray.cluster_utils import Cluster

        self._ours = Descendants(os.getpid(), but=psutil.Process().children())
        self._drivers: list[subprocess.Popen[bytes]] = []
        # By itself it takes 8265 for its dashboard. Where another has that, it has no dashboard,
        # and leaves a socket open whose warning hits the next test.
        head = {"num_cpus": 0, "dashboard_port": free_ports(1)[0]}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._environment = {**environment, "RAY_ADDRESS": self._cluster.address}

    def add(self) -> Any:
        """One more node, of one CPU; it is there when this returns."""
        node = self._cluster.add_node(num_cpus=1)
        self._cluster.wait_for_nodes()
        return node

    def lose(self, node: Any) -> None:
        """Kill a node without a word to the others."""
        self._ours.look()
        self._cluster.remove_node(node, allow_graceful=False)

    def drive(self, job: str, argument: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a driver; it is killed with the cluster."""
        with log.open("a") as output:
            driver = subprocess.Popen(
                [sys.executable, "-c", job, argument],
                env=self._environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._drivers.append(driver)
        return driver

    def end(self) -> None:
        self._ours.look()
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        self._cluster.shutdown()
        self._ours.end()
        del self._cluster
        gc.collect()  # Ray leaves sockets open, and their warnings must not hit another test


@contextlib.contextmanager
def running_nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    """Nodes that end with the block; Ray's settings in ``environment`` hold for them.

    They have a folder of their own, where their address is noted: a process that names none would
    join what is noted in the machine's.
    """
    settings = {
        name: value
        for name, value in environment.items()
        if name.startswith("RAY_") and name != "RAY_ADDRESS"
    }
    with short_folder() as folder, mock.patch.dict(os.environ, settings, RAY_TMPDIR=str(folder)):
        nodes = Nodes(environment)
        try:
            yield nodes
        finally:
            nodes.end()


class Descendants:
    """All processes that ever came of one, as often as one looked, and their end.

    Args:
        but: children of it that are none of this test's business.
    """

    def __init__(self, pid: int, but: Iterable[psutil.Process] = ()):
        self._root, self._but = psutil.Process(pid), set(but)
        self._seen: set[psutil.Process] = set()
        self.look()

    def look(self) -> None:
        """An orphan is known if it was seen before its parent died."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in set(self._root.children()) - self._but:
                self._seen.add(child)
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._seen.update(child.children(recursive=True))

    def alive(self) -> list[psutil.Process]:
        """Those that run."""
        self.look()
        return [one for one in self._seen if _name_of(one)]

    def kill(self, name: str) -> None:
        """Kill those whose name or command has ``name``, once there is one."""
        wait_for(lambda: any(name in _name_of(one) for one in self.alive()))
        for one in [one for one in self.alive() if name in _name_of(one)]:
            one.kill()
            wait_for(lambda one=one: not _name_of(one))

    def end(self) -> None:
        left = self.alive()
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=PATIENCE)


def _name_of(process: psutil.Process) -> str:
    """The title of a process that runs; nothing for another."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return ""


def ray_processes(ancestor: int, name: bytes) -> list[int]:
    """Descendants of a process that Ray gave titles with ``name``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            title = path.read_bytes()
            if title.startswith(b"ray::") and name in title and _descends(path.parent, ancestor):
                found.append(int(path.parent.name))
    return sorted(found)


def _descends(process: Path, ancestor: int) -> bool:
    pid = int(process.name)
    while pid > 1:
        if pid == ancestor:
            return True
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(next(ln for ln in status.splitlines() if ln.startswith("PPid")).split()[1])
    return False


def finish(process):
    """Exit status and everything printed."""
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def succeed(process):
    status, output = finish(process)
    assert status == 0, output
    return output


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """For a Ray's files, whose sockets need a short path; it goes with the block."""
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_cluster(log: Path, extra: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A cluster that is up, and ends with the block; ``extra`` is for its environment."""
    with short_folder() as folder:
        cluster = Cluster(folder, log, extra or {})
        try:
            cluster.wait_until_up()
            yield cluster
        finally:
            cluster.end()
