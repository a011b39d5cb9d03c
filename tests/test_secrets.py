"""Tokens and keys stay out of what is saved, logged and shown, however Ray was started.

Slow: two Rays of their own, since how a Ray is started is what is asked about.
"""

import contextlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fixtures import keeper
from tests.fixtures.ray_head import ENVIRONMENT, RAY, ROOT
from tests.fixtures.waiting import PATIENCE, free_ports, wait_for
from tests.fixtures.worlds import make_world, student_config, write_pictures, zoo_config

pytest.importorskip("ray")

from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.config import RunConfig, save_run_config
from tinyflux.distributed.ray_token import guard_token
from tinyflux.model.config import ZooConfig
from tinyflux.serving.app import build_app
from tinyflux.serving.config import ServeConfig
from tinyflux.util.files import warn_if_readable

# What Ray's dashboard reads to fill its pages: jobs and their environments, nodes and their
# processes, actors, tasks, workers.
PAGES = ("api/jobs/", "nodes?view=summary", "logical/actors", "api/v0/actors?detail=1",
         "api/v0/tasks?detail=1", "api/v0/workers?detail=1", "api/v0/runtime_envs?detail=1",
         "api/v0/jobs?detail=1", "api/cluster_status")  # fmt: skip
BARE = """
import sys, httpx, psutil, ray
from pathlib import Path
from tinyflux.distributed.ray_session import ensure_ray
ensure_ray()
ray.get(ray.remote(lambda: 1).remote())
me, listening = psutil.Process(), {}
for process in [me, *me.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            name = f"{process.name()} at {connection.laddr.ip}:{connection.laddr.port}"
            listening[name] = connection.laddr.ip.removeprefix("::ffff:")
assert len(listening) > 5, listening  # there was something to look at
assert set(listening.values()) <= {"127.0.0.1", "::1"}, listening
url = "http://" + ray._private.worker.global_worker.node.address_info["webui_url"]
assert url.startswith("http://127.0.0.1:"), url
token = (Path.home() / ".ray" / "auth_token").read_text()
for page in sys.argv[1:]:
    answer = httpx.get(f"{url}/{page}", headers={"Authorization": f"Bearer {token}"})
    print(answer.raise_for_status().text)
assert httpx.get(f"{url}/api/jobs/").status_code == 401
"""


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))  # sockets need a short path
    yield path
    shutil.rmtree(path, ignore_errors=True)


def files_with(secret, *folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    assert len(paths) > 20  # there is something to find it in
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_job_leaves_no_token_and_no_key_behind(folder, tmp_path):
    token, key = secrets.token_hex(32), f"hf_{secrets.token_hex(16)}"
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    environment = {
        **ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file),
        "HF_TOKEN": key,
    }  # fmt: skip
    write_pictures(tmp_path / "pictures")
    make_world(tmp_path / "world")
    run = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(folder=str(tmp_path / "pictures"), height=16, width=16),
        zoo=zoo_config(tmp_path / "world"),
        cache=CacheConfig(path=str(tmp_path / "run" / "cache"), cpus_per_actor=0.5),
        model=student_config(),
    )
    save_run_config(run, tmp_path / "run.yaml")
    ports = free_ports(4)
    address = f"http://127.0.0.1:{ports[1]}"
    with (tmp_path / "head.log").open("w") as output:
        head = keeper.start(
            [*RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={ports[0]}",
             f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
             f"--ray-client-server-port={ports[3]}", f"--temp-dir={folder}",
             "--object-store-memory=100000000"],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    allowed = {"Authorization": f"Bearer {token}"}

    def status(headers):
        try:
            return httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code
        except httpx.TransportError:
            return 0

    try:
        wait_for(lambda: status(allowed) == 200)
        assert status({}) == 401
        assert status({"Authorization": "Bearer wrong"}) == 403
        job = subprocess.run(
            [*RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", "python",
             "ray_jobs/build_cache.py", "--config", str(tmp_path / "run.yaml")],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
        assert job.returncode == 0, job.stdout + job.stderr
        shown = job.stdout + job.stderr
        for page in PAGES:
            answer = httpx.get(f"{address}/{page}", headers=allowed, timeout=30)
            shown += answer.raise_for_status().text
        assert "build_cache.py" in shown
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(10)
    for secret in (token, key):
        assert secret not in shown
        assert files_with(secret, folder, tmp_path) == ([token_file] if secret == token else [])


def token_file(home):
    return home / ".ray" / "auth_token"


@pytest.mark.slow
def test_a_ray_of_its_own_is_guarded_on_loopback_and_tells_no_token(folder, tmp_path):
    key = f"hf_{secrets.token_hex(16)}"
    environment = {
        **ENVIRONMENT, "HF_TOKEN": key, "HOME": str(tmp_path), "RAY_TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    del environment["RAY_AUTH_MODE"]  # as a newcomer has it
    process = subprocess.run(
        [sys.executable, "-c", BARE, *PAGES], env=environment, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert stat.S_IMODE(token_file(tmp_path).stat().st_mode) == 0o600
    token = token_file(tmp_path).read_text()
    for secret in (token, key):
        assert secret not in process.stdout + process.stderr
        assert files_with(secret, folder) == []


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_that_is_made_for_a_ray_of_its_own_is_its_owners_alone(home, caplog):
    guard_token(make=False)
    assert not token_file(home).exists()
    old = os.umask(0)
    try:
        guard_token(make=True)
    finally:
        os.umask(old)
    first = token_file(home).read_text()
    assert len(first) == 64
    assert stat.S_IMODE(token_file(home).stat().st_mode) == 0o600
    assert stat.S_IMODE(token_file(home).parent.stat().st_mode) == 0o700
    guard_token(make=True)
    assert token_file(home).read_text() == first
    assert list(token_file(home).parent.iterdir()) == [token_file(home)]
    assert caplog.messages == []


def test_a_token_that_others_can_read_is_said_in_one_line(home, caplog, monkeypatch):
    guard_token(make=True)
    token_file(home).chmod(0o640)
    guard_token(make=True)
    said = f"others can read Ray's token: chmod 600 {token_file(home)}"
    assert caplog.messages == [said]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it is not used
    guard_token(make=True)
    assert caplog.messages == [said]


def test_keys_that_others_can_read_are_said_in_one_line(tmp_path, caplog):
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-the-tests-0123456789")
    config = ServeConfig(checkpoint="runs/a", api_keys_file=str(keys))
    keys.chmod(0o600)
    build_app(config, ZooConfig())
    assert caplog.messages == []
    keys.chmod(0o604)
    build_app(config, ZooConfig())
    assert caplog.messages == [f"others can read the API keys: chmod 600 {keys}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_keys_may_be_for_a_group(tmp_path, caplog):
    keys = tmp_path / "keys"
    keys.touch()
    os.chown(keys, 12345, 12345)
    keys.chmod(0o640)
    warn_if_readable(keys, "the API keys")
    assert caplog.messages == []
    keys.chmod(0o644)
    warn_if_readable(keys, "the API keys")
    assert caplog.messages == [f"others can read the API keys: chmod o= {keys}"]


def test_a_saved_run_has_no_setting_that_holds_a_secret(tmp_path):
    save_run_config(RunConfig(), tmp_path / "config.yaml")

    def names(value):
        for name, inner in value.items():
            yield name
            if isinstance(inner, dict):
                yield from names(inner)

    # A file of keys may be named; a key may not be given.
    suspects = [
        name for name in names(yaml.safe_load((tmp_path / "config.yaml").read_text()))
        if any(part in name.split("_") for part in ("key", "keys", "token", "secret", "password"))
        and not name.endswith("_file")
    ]  # fmt: skip
    assert set(suspects) <= {"image_key", "caption_key", "mask_key"}  # names in a data set
