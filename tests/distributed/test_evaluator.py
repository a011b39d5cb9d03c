"""The evaluator beside training gives way when it is slow.

Slow: it starts a Ray.
"""

import logging
import time
from pathlib import Path

import pytest
import torch

ray = pytest.importorskip("ray")

from tests.fixtures.waiting import wait_for  # noqa: E402
from tinyflux.distributed.evaluator import ActorEvaluator  # noqa: E402
from tinyflux.distributed.ray_session import ensure_ray  # noqa: E402
from tinyflux.trainer.evaluation import Evaluation, EvaluationRequest  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class Slow:
    """An evaluator that looks for as long as a file is not there."""

    def __init__(self, release: Path):
        self.model = self.ema = self
        self.decay, self._release = 0.9, release

    def load_state_dict(self, state):
        pass

    def look(self, look):
        while not self._release.exists():
            time.sleep(0.1)
        return Evaluation(look.step, {"val_velocity": float(look.step)})


@pytest.fixture
def here():
    ensure_ray()
    yield
    ray.shutdown()


def test_a_slow_evaluator_is_given_up_and_asked_again_when_it_is_done(here, tmp_path, caplog):
    release = tmp_path / "release"
    evaluations = ActorEvaluator(lambda device: Slow(release), gpus=0, threads=1, seconds=1.0)
    tensors = {"weight": torch.zeros(2)}
    evaluations.submit(EvaluationRequest(1, True, False, (4, 4)), tensors, tensors)
    with caplog.at_level(logging.WARNING):
        assert evaluations.take(wait=True) == []
        evaluations.submit(EvaluationRequest(2, True, False, (4, 4)), tensors, tensors)
        assert evaluations.take(wait=True) == []
    assert "step 1 are not looked at: the evaluator took over 1 s" in caplog.text
    assert "step 2 are not looked at: the evaluator is still busy" in caplog.text
    release.touch()
    found: list[Evaluation] = []

    def answered() -> bool:
        evaluations.submit(EvaluationRequest(3, True, False, (4, 4)), tensors, tensors)
        found.extend(evaluations.take(wait=True))
        return bool(found)

    wait_for(answered)
    assert [one.step for one in found] == [3]
