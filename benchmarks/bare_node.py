"""How long a node that has nothing but Ray takes to run its first job, and its second.

``python benchmarks/bare_node.py``: makes an environment with Ray alone, starts a node from it and
submits one job twice, as docs/clusters.md has it for a cluster of somebody else's.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

from record import add_json_option, record

ROOT = Path(__file__).resolve().parents[1]
JOB = "import sys, torch, deepspeed, tinyflux; print('ran with torch', torch.__version__)"


def main() -> None:
    """Measure the seconds of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tf", dir="/tmp"))  # sockets need a short path
    binaries = folder / "bare" / "bin"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "RAY_AUTH_MODE": "disabled",
    }
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "bare"], check=True)
    ray = f"ray[default]=={version('ray')}"
    constraints = ROOT / "constraints.txt"
    subprocess.run([binaries / "pip", "install", "--quiet", "-c", constraints, ray], check=True)
    seconds = {"environment with Ray alone": time.monotonic() - began}

    gcs, dashboard, agent, client = _free_ports(4)
    address = f"http://127.0.0.1:{dashboard}"
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [binaries / "ray", "start", "--head", "--block", "--disable-usage-stats",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}",
             f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
             f"--ray-client-server-port={client}", f"--temp-dir={folder}",
             "--object-store-memory=100000000"],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        _wait_for(f"{address}/api/jobs/", head, log)
        for which in ("first", "second"):
            began = time.monotonic()
            subprocess.run(
                [binaries / "ray", "job", "submit", "--address", address, "--working-dir", ".",
                 "--runtime-env", "runtime_env.yaml", "--", "python", "-c", JOB],
                env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            seconds[f"{which} job"] = time.monotonic() - began
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
    record({"seconds": {name: round(taken) for name, taken in seconds.items()}}, options.json)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for(url: str, head: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if head.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"Ray did not start: {log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
