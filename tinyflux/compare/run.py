"""``tinyflux compare``: caches, trials, figures and a page, continued where it stopped."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyflux.compare.config import CompareConfig, make_trials
from tinyflux.compare.page import write_page
from tinyflux.compare.results import make_record, to_json
from tinyflux.compare.trials import build_caches, run_trials
from tinyflux.distributed.run_lock import claimed
from tinyflux.report.charts import load_pyplot
from tinyflux.util.files import atomic_write

RECORD, PAGE = "comparison.json", "page.html"

logger = logging.getLogger(__name__)


def run_comparison(name: str, config: CompareConfig) -> Path:
    """Do what a comparison still lacks, and write its record and its page; the page's path.

    Args:
        name: of the comparison, for people.

    Raises:
        TinyFluxError: what a user can mend.
    """
    load_pyplot()  # not after hours of training
    trials = make_trials(config)
    output = Path(config.output)
    stages: dict[str, float] = {}
    with claimed(config.output):
        logger.info(
            "comparing %s with %d seeds: %d trials in %s",
            ", ".join(config.names),
            len(config.seeds),
            len(trials),
            output,
        )
        with _timed(stages, "cache"):
            build_caches(trials)
        with _timed(stages, "trials"):
            run_trials(config, trials)
        record = make_record(name, config, trials, stages)
        atomic_write(output / RECORD, to_json(record).encode())
        for one in record.against(record.metric):
            logger.info(one.verdict)
        write_page(output / PAGE, record, output)
    return output / PAGE


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    stages[name] = time.monotonic() - begun
