"""docs/journey.md against what really happens, in one process, from pictures to a picture.

Slow: it builds a cache, trains and draws with every call of the library noted.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from tests.fixtures.pages import ROOT, definitions, linked_symbols
from tests.fixtures.waiting import PATIENCE
from tests.fixtures.worlds import CAPTIONS, make_world, student_config, write_pictures, zoo_config
from tinyflux.cache.build import build
from tinyflux.cache.config import CacheConfig, DataConfig
from tinyflux.cache.job import BuildConfigs
from tinyflux.cache.runner import LocalRunner
from tinyflux.config import RunConfig
from tinyflux.distributed.train_local import train_local
from tinyflux.inference.request import SampleRequest
from tinyflux.serving.config import ServeConfig
from tinyflux.serving.engine import open_engine
from tinyflux.trainer.config import TrainerConfig

pytestmark = pytest.mark.slow
# What only Ray, DeepSpeed, a browser or a bucket reaches, and protocols, which nobody calls.
ELSEWHERE = {
    "RayRunner", "DeepSpeedEngine", "train", "train_worker", "Mirror", "Store",
    "build_app", "generate", "generations", "EngineClient", "EngineReplica", "Sampler",
    "evaluate", "measure", "write_report", "run_stages",
}  # fmt: skip


@contextmanager
def noted(symbols: list[tuple[str, str, range]]) -> Iterator[list[str]]:
    """The names of those symbols that are called meanwhile, in any thread; runs of one are one."""
    calls: list[str] = []
    by_file: dict[str, list[tuple[str, range]]] = {}
    for path, name, lines in symbols:
        by_file.setdefault(path, []).append((name, lines))

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_filename not in by_file:
            return
        for name, lines in by_file[frame.f_code.co_filename]:
            if frame.f_code.co_firstlineno in lines and calls[-1:] != [name]:
                calls.append(name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def go(folder) -> None:
    """Build a cache of a few pictures, train four steps on it and draw a picture."""
    make_world(folder / "world")
    write_pictures(folder / "pictures", CAPTIONS[:6])
    run = RunConfig(
        run_dir=str(folder / "run"),
        data=DataConfig(str(folder / "pictures"), height=16, width=16),
        zoo=zoo_config(folder / "world"),
        cache=CacheConfig(str(folder / "cache"), rows_per_shard=4, batch_size=3),
        model=student_config(),
        trainer=TrainerConfig(
            batch_size=2, gradient_accumulation=1, total_steps=4, save_every_steps=1,
            val_fraction=0.0, sample_every=None, dtype=torch.float32, trackers=[],
        ),
    )  # fmt: skip
    configs = BuildConfigs(run.data, run.zoo, run.cache, run.model)
    build(configs, LocalRunner(configs))
    checkpoint = train_local(run)
    engine = open_engine(ServeConfig(checkpoint=checkpoint, default_size=16), run.zoo)
    try:
        request = SampleRequest(CAPTIONS[0], "", 2, 3.0, 4, 4, seed=0)
        assert engine.submit(request).result(PATIENCE).isfinite().all()
    finally:
        engine.close()


def test_the_page_names_what_is_reached_in_the_order_in_which_it_is_reached(tmp_path):
    page = ROOT / "docs" / "journey.md"
    symbols = [(str(path), name, definitions(path)[name]) for path, name in linked_symbols(page)]
    with noted(symbols) as calls:
        go(tmp_path)
    route = [name for _, name, _ in symbols if name not in ELSEWHERE]
    assert len(route) > 30
    assert set(route) <= set(calls)
    later = iter(calls)
    for name in route:
        assert name in later, f"{name} is not reached after what the page names before it"
