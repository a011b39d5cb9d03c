"""``serve deploy`` of the shipped application to a test's Ray."""

import subprocess
import sys
from pathlib import Path

from tests.ray_head import ENVIRONMENT


def deploy(cluster, file):
    subprocess.run(
        [str(Path(sys.executable).parent / "serve"), "deploy", "--address", cluster.address, file],
        env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
