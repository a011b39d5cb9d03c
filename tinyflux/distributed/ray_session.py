"""One way into Ray for every job."""

import logging
import os
from pathlib import Path
from typing import Any

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
    # Ray Train would print every line of a worker a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # It says that progress bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": logging.WARNING}
    if address is None:
        root = str(Path(tinyflux.__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
            "TQDM_DISABLE": "1",  # one bar per loaded model and worker
        }
        options.update(
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            runtime_env={"env_vars": environment},
        )
        # It says that a token guards this Ray, which is as it should be.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(address=address, **options)
