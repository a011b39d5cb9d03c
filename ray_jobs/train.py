"""Train with Ray Train and DeepSpeed.

``python ray_jobs/train.py --config FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli.main import run_job

if __name__ == "__main__":
    sys.exit(run_job("train"))
