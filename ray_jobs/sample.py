"""Draw pictures for prompts.

``python ray_jobs/sample.py --config FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("sample"))
