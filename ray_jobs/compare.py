"""Compare arms of a run over seeds with Ray Tune.

``python ray_jobs/compare.py FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("compare"))
