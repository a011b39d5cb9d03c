"""What every test shares: one thread, offline hubs, seeded hypothesis."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before torch is imported: two cores run many small tensors faster with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tests.fixtures.browser import running_browser
from tests.fixtures.ray_head import Cluster, running_cluster
from tinyflux.util.logging import log_to_console

hypothesis.settings.register_profile(
    "tinyflux", deadline=None, derandomize=True, max_examples=30, database=None
)
hypothesis.settings.load_profile("tinyflux")

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# As in every process of the command line: `capsys` sees the library's lines.
log_to_console()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, the longest begin first, so that none of them is alone at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [_lacks(item, name) for name in ("fault", "slow")])


def _lacks(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is None


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray that this process's tests share, one after the other.

    Who kills one of its own processes there may; who loses nodes, deploys or sets an environment
    starts a Ray of their own with ``running_cluster``.
    """
    with running_cluster(tmp_path_factory.mktemp("ray") / "head.log") as cluster:
        yield cluster


# Of a module, no longer: while it is open this thread has a running event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The system's Chromium, where there is one."""
    with running_browser() as browser:
        yield browser
