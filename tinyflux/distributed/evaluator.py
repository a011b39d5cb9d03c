"""Evaluations beside training: a process of its own looks at copies of the weights."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from tinyflux.distributed.relay import errors_as_raised
from tinyflux.errors import TrainingError
from tinyflux.trainer.evaluation import Evaluation, EvaluationRequest, Evaluator
from tinyflux.util.device import resolve_device
from tinyflux.util.text import last_line

# The other workers wait in a collective meanwhile, 1,800 seconds at most.
START_SECONDS = 1200.0

logger = logging.getLogger(__name__)


class ActorEvaluator:
    """Has an actor look at the weights while training goes on.

    One look is under way at a time: the next waits for it, so that what is asked for cannot pile
    up. The actor is made anew if its node dies, and asked again.

    Args:
        make: builds the evaluator, there.
        gpus: share of a GPU for the actor; 0 leaves it on the CPU.
        threads: of torch, there.
        seconds: how long training waits for a look at most. What takes longer is given up with a
            line, and so is what is asked for while the actor is still at it: a slow evaluator must
            not hold the workers, who wait for the first one in a collective.

    Raises:
        TinyFluxError: what ``make`` raised: a model that is missing must not end a run later.
        TrainingError: the actor did not start.
    """

    def __init__(
        self,
        make: Callable[[torch.device], Evaluator],
        gpus: float,
        threads: int,
        seconds: float = 600.0,
    ):
        self._seconds = seconds
        self._given_up: ray.ObjectRef[Evaluation] | None = None  # what the actor may still be at
        # No CPU of its own: on a small machine the workers have taken all there are.
        actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Actor)
        self._actor = cast("ActorHandle[_Actor]", actor.remote(make, gpus > 0, threads))
        self._asked: list[tuple[int, ray.ObjectRef[Evaluation]]] = []
        self._done: list[Evaluation] = []
        try:
            with errors_as_raised():
                ray.get(self._actor.load.remote(), timeout=START_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise TrainingError(
                f"the process that validates and draws was not there within {START_SECONDS:g} s: "
                "does the cluster have room for workers.evaluator_gpus?"
            ) from None

    def submit(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        """Copy the tensors and have them looked at."""
        self._done += self.take(wait=True)
        if self._given_up is not None:
            if not ray.wait([self._given_up], timeout=0)[0]:
                logger.warning(
                    "the weights of step %d are not looked at: the evaluator is still busy",
                    request.step,
                )
                return
            self._given_up = None
        answer = self._actor.look.remote(request, _arrays(weights), _arrays(shadow))
        self._asked.append((request.step, answer))

    def take(self, wait: bool = False) -> list[Evaluation]:
        """See :class:`tinyflux.trainer.evaluation.Evaluations`."""
        done, self._done = self._done, []
        deadline = time.monotonic() + self._seconds
        while self._asked:
            step, answer = self._asked[0]
            left = max(deadline - time.monotonic(), 0.0) if wait else 0.0
            if not ray.wait([answer], timeout=left)[0]:
                if wait:
                    logger.warning(
                        "the weights of step %d are not looked at: the evaluator took over %g s "
                        "(workers.evaluator_seconds)",
                        step,
                        self._seconds,
                    )
                    self._given_up = answer
                    self._asked.clear()
                break
            del self._asked[0]
            try:
                done.append(ray.get(answer))
            except ray.exceptions.RayError as error:
                # Training is worth more than one figure.
                reason = last_line(error)
                logger.warning("the weights of step %d could not be looked at: %s", step, reason)
        return done


class _Actor:
    """The process beside training."""

    def __init__(self, make: Callable[[torch.device], Evaluator], gpu: bool, threads: int):
        torch.set_num_threads(threads)
        self._make, self._device = make, resolve_device("cuda" if gpu else "cpu")
        self._evaluator: Evaluator | None = None

    def load(self) -> None:
        """Build the evaluator, where it can raise what a caller understands."""
        self._evaluator = self._make(self._device)

    def look(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, np.ndarray],
        shadow: Mapping[str, np.ndarray],
    ) -> Evaluation:
        """Look at these weights."""
        if self._evaluator is None:  # the actor was made anew
            self.load()
        evaluator = self._evaluator
        assert evaluator is not None
        # Copies: what Ray hands over cannot be written.
        evaluator.model.load_state_dict({n: torch.tensor(a) for n, a in weights.items()})
        averaged = {name: torch.tensor(array) for name, array in shadow.items()}
        evaluator.ema.load_state_dict({"decay": evaluator.ema.decay, "shadow": averaged})
        evaluation = evaluator.look(request)
        images = None if evaluation.images is None else evaluation.images.cpu()
        return replace(evaluation, images=images)


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """As Ray copies them without pickling their bytes."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
