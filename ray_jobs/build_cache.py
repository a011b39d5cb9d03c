"""Build a dataset with Ray Data.

``python ray_jobs/build_cache.py --config FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("cache", ["build", *sys.argv[1:]]))
