"""Measure a finished run against an untrained student.

``python ray_jobs/evaluate.py --config FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate"))
