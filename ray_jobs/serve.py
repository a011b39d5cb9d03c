"""Answer prompts over HTTP with Ray Serve.

``python ray_jobs/serve.py --config FILE [--section.key VALUE]``, or with Ray Serve's own command:
``serve run ray_jobs.serve:app config=FILE [section.key=VALUE]``, where the environment's
``TINYFLUX_CONFIG`` may name the file instead.
"""

import os
import sys

from ray.serve import Application

from tinyflux.cli.main import run_job


def app(args: dict[str, str]) -> Application:
    """What ``serve run`` and ``serve deploy`` build; ``args`` are a run's settings by name."""
    from tinyflux.config import parse_run_config
    from tinyflux.serving.app import build_app

    settings = dict(args)
    file = settings.pop("config", os.environ.get("TINYFLUX_CONFIG"))
    chosen = [] if file is None else ["--config", file]
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    run = parse_run_config([*chosen, *overrides], "tinyflux serve")
    return build_app(run.serve, run.zoo)


if __name__ == "__main__":
    sys.exit(run_job("serve"))
