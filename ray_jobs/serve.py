"""Answer prompts over HTTP with Ray Serve.

``python ray_jobs/serve.py --config FILE [--section.key VALUE]``
"""

import sys

from tinyflux.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("serve"))
