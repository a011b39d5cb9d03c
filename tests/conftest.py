"""What every test shares: one thread, offline hubs, seeded hypothesis."""

import os

# Before torch is imported: two cores run many small tensors faster with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "tinyflux", deadline=None, derandomize=True, max_examples=30, database=None
)
hypothesis.settings.load_profile("tinyflux")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
