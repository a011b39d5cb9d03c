"""``tinyflux compare``: caches, trials, figures and a page, continued where it stopped."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tinyflux.compare.config import CompareConfig, make_trials
from tinyflux.compare.page import make_page
from tinyflux.compare.results import make_record, to_json
from tinyflux.compare.trials import build_caches, run_trials
from tinyflux.distributed.run_lock import claimed
from tinyflux.report.charts import load_pyplot
from tinyflux.storage.remote import open_folder
from tinyflux.util.urls import join

RECORD, PAGE = "comparison.json", "page.html"

logger = logging.getLogger(__name__)


def run_comparison(name: str, config: CompareConfig) -> str:
    """Do what a comparison still lacks, and write its record and its page; the page's place.

    Args:
        name: of the comparison, for people.

    Raises:
        TinyFluxError: what a user can mend.
    """
    load_pyplot()  # not after hours of training
    trials = make_trials(config)
    output = open_folder(config.output)
    stages: dict[str, float] = {}
    with claimed(config.output):
        logger.info(
            "comparing %s with %d seeds: %d trials in %s",
            ", ".join(config.names),
            len(config.seeds),
            len(trials),
            config.output,
        )
        with _timed(stages, "cache"):
            build_caches(trials)
        with _timed(stages, "trials"):
            run_trials(config, trials)
        record = make_record(name, config, trials, stages)
        output.write(RECORD, to_json(record).encode())
        for one in record.against(record.metric):
            logger.info(one.verdict)
        output.write(PAGE, make_page(record, output).encode())
    return join(config.output, PAGE)


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    stages[name] = time.monotonic() - begun
