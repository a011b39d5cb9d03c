"""Where a job finds its Ray.

Slow: it starts two Rays.
"""

import subprocess
import sys

import pytest

from tests.fixtures.ray_head import ROOT, short_folder

pytestmark = pytest.mark.slow


def test_a_job_without_an_address_joins_no_cluster_of_another(head):
    """Ray notes the cluster that was last started on a machine, and joins it unasked."""
    with short_folder() as folder:
        note = folder / "ray" / "ray_current_cluster"
        note.parent.mkdir()
        note.write_text(head.environment["RAY_ADDRESS"])
        environment = {**head.environment, "RAY_TMPDIR": str(folder)}
        del environment["RAY_ADDRESS"]
        code = (
            "from tinyflux.distributed.ray_session import ensure_ray; import ray; ensure_ray();"
            "print(ray.get_runtime_context().gcs_address)"
        )
        said = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
    port = head.environment["RAY_ADDRESS"].rpartition(":")[2]
    assert said.strip().rpartition(":")[2] != port
