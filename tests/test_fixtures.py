"""What the fixtures promise where other tests cannot tell. Slow: Ray's own commands are run."""

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from tests.fixtures import keeper
from tests.fixtures.deployment import deploy
from tests.fixtures.ray_head import ROOT
from tests.fixtures.waiting import wait_for

# Its child has a child of its own group and one of another session, and neither minds its end.
OWNER = """
import sys, time
from tests.fixtures import keeper

child = "import subprocess, time\\n" + "\\n".join(
    f"print(subprocess.Popen(['sleep', '600'], start_new_session={new}).pid, flush=True)"
    for new in (False, True)
) + "\\ntime.sleep(600)"
print(keeper.start([sys.executable, "-c", child]).pid, flush=True)
time.sleep(600)
"""


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_the_tests_start_ends_with_them_though_they_are_killed():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    with owner:
        pids = [int(owner.stdout.readline()) for _ in range(3)]
        assert all(runs(pid) for pid in pids)
        owner.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(runs(pid) for pid in pids))


def test_a_keeper_leaves_its_child_alone_and_goes_with_it():
    def keepers():
        return [one for one in psutil.process_iter(["cmdline"])
                if (words := one.info["cmdline"]) and keeper.__file__ in words
                and words[-1] == str(child.pid)]  # fmt: skip

    child = keeper.start(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert len(keepers()) == 1
    assert child.communicate("still here")[0] == "still here"
    assert child.returncode == 0
    wait_for(lambda: not keepers())


class BusyDashboard(BaseHTTPRequestHandler):
    """A dashboard whose first answer to a deployment is that it has no time."""

    def do_GET(self):
        self.answer(200, {"ray_version": "2.50.0"})

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self.answer(500 if self.server.asked == 1 else 200, {})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard():
    with ThreadingHTTPServer(("127.0.0.1", 0), BusyDashboard) as server:
        server.asked = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_deployment_is_told_again_to_a_ray_that_is_busy(dashboard, tmp_path):
    (tmp_path / "serve.yaml").write_text("applications: []\n")
    deploy(f"http://127.0.0.1:{dashboard.server_port}", tmp_path / "serve.yaml")
    assert dashboard.asked == 2


@pytest.mark.slow
def test_a_deployment_that_can_never_be_says_why_at_once(dashboard, tmp_path):
    (tmp_path / "serve.yaml").write_text("applications: [{nmae: wrong}]\n")
    with pytest.raises(AssertionError, match="nmae"):
        deploy(f"http://127.0.0.1:{dashboard.server_port}", tmp_path / "serve.yaml")
    assert dashboard.asked == 0
