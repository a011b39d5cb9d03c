"""One way into Ray for every job."""

import logging
import os
from pathlib import Path

import ray

import tinyflux


def ensure_ray() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine only.

    Does nothing where Ray is already running in this process. Workers on this machine find the
    package where this process has it.
    """
    if ray.is_initialized():
        return
    # Ray would otherwise rebuild uv's environments on its own terms.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, object] = {"logging_level": logging.WARNING}
    if address is None:
        root = str(Path(tinyflux.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        options.update(
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        )
    ray.init(address=address, log_to_driver=True, **options)
