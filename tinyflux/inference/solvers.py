"""Ways to follow the flow from noise to data, one velocity at a time.

A solver never calls the model. It says where and when it wants a velocity, and is told; so samples
at different steps, with different solvers, can have theirs from one forward.
"""

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

from torch import Tensor

from tinyflux.errors import InputError

# Asks for the velocity of a state at a time; is sent that velocity; returns the last state.
Steps = Generator[tuple[Tensor, float], Tensor, Tensor]


def euler(x: Tensor, times: Sequence[float]) -> Steps:
    """First order: ``x + h * v``. One evaluation a step."""
    for t, t_next in pairwise(times):
        v = yield x, t
        x = x + (t_next - t) * v
    return x


def heun(x: Tensor, times: Sequence[float]) -> Steps:
    """Second order: the mean of the velocities at both ends of a step. Two evaluations a step.

    The explicit trapezoidal rule, as in Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """
    for t, t_next in pairwise(times):
        h = t_next - t
        v = yield x, t
        v_next = yield x + h * v, t_next
        x = x + h / 2 * (v + v_next)
    return x


def multistep(x: Tensor, times: Sequence[float]) -> Steps:
    """Second order: the velocity's line through this step and the last. One evaluation a step.

    Adams-Bashforth 2 with variable steps (Hairer, Norsett & Wanner, Solving Ordinary Differential
    Equations I, section III.5); the first step is Euler's.
    """
    v_last, h_last = None, 0.0
    for t, t_next in pairwise(times):
        h = t_next - t
        v = yield x, t
        slope = 0.0 if v_last is None else (v - v_last) / h_last
        x = x + h * (v + h / 2 * slope)
        v_last, h_last = v, h
    return x


SOLVERS: dict[str, Callable[[Tensor, Sequence[float]], Steps]] = {
    "euler": euler,
    "heun": heun,
    "multistep": multistep,
}


class Trajectory:
    """A state on its way along ``times``, moved by one velocity at a time.

    Attributes:
        x: where the next velocity is wanted, of the shape it was given; at the end, the result.
        t: when it is wanted.
        step, total: whole steps done, of how many.
        evaluations: velocities still wanted.

    Args:
        x: the state at ``times[0]``: one sample, or several that share their times.
        times: ``[total + 1]``, rising.
        solver: one of ``SOLVERS``.

    Raises:
        InputError: no solver has that name.
    """

    def __init__(self, x: Tensor, times: Sequence[float], solver: str = "euler"):
        check_solver(solver)
        self.step, self.total = 0, len(times) - 1
        self._each = evaluations_per_step(solver)
        self.evaluations = self.total * self._each
        self._end = times[-1]
        self._steps = SOLVERS[solver](x, times)
        self.x, self.t = next(self._steps)
        self._estimate: tuple[Tensor, Tensor, float] | None = None

    def advance(self, v: Tensor) -> bool:
        """Take the velocity at ``x`` and ``t``; whether that ended a step."""
        self._estimate = (self.x, v, self.t)
        self.evaluations -= 1
        self.step = self.total - -(-self.evaluations // self._each)
        try:
            self.x, self.t = self._steps.send(v)
        except StopIteration as end:
            self.x, self.t = end.value, self._end
        return self.evaluations % self._each == 0

    def data(self) -> Tensor:
        """What the data would be if the last velocity held on: a preview of the result."""
        if self._estimate is None:
            return self.x
        x, v, t = self._estimate
        return x + (1 - t) * v  # with t as a number: a tensor would make a GPU wait


def evaluations_per_step(solver: str) -> int:
    """Forwards that a step of ``solver`` takes."""
    return 2 if solver == "heun" else 1


def check_solver(solver: str) -> None:
    """Refuse an unknown name with an :class:`InputError`."""
    if solver not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
