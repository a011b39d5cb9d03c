import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.errors import InputError
from tinyflux.inference.sampler import sample_grid
from tinyflux.inference.solvers import SOLVERS, Trajectory, evaluations_per_step

names = st.sampled_from(sorted(SOLVERS))


def velocity(x, t):
    """Of ``x(t) = x(0) * exp(sin(3 t))``, for ``[B, ...]`` states at times ``[B]``."""
    return 3 * torch.cos(3 * t).reshape(-1, *(1,) * (x.ndim - 1)) * x


def finish(paths, group=None):
    """Move ``paths`` to their ends, ``group`` at a time from one call of ``velocity``."""
    while running := [path for path in paths if path.evaluations]:
        # The one with the most left goes first, so that the others stand at odd steps.
        running = sorted(running, key=lambda path: -path.evaluations)[: group or len(paths)]
        x = torch.stack([path.x for path in running])
        v = velocity(x, torch.tensor([path.t for path in running], dtype=x.dtype))
        for path, each in zip(running, v, strict=True):
            path.advance(each)
    return [path.x for path in paths]


def error(solver, steps, shift):
    x = torch.ones(1, dtype=torch.float64)
    (end,) = finish([Trajectory(x, sample_grid(steps, shift).double().tolist(), solver)])
    return abs(float(end) - math.exp(math.sin(3)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_a_solver_has_its_order_of_convergence(solver, order, shift):
    seen = math.log2(error(solver, 128, shift) / error(solver, 256, shift))
    assert seen == pytest.approx(order, abs=0.15)


def test_second_order_is_nearer_at_the_same_number_of_steps():
    assert error("multistep", 28, 3.0) < error("euler", 28, 3.0) / 1.5
    assert error("heun", 28, 3.0) < error("euler", 28, 3.0) / 1.5


@given(names, st.integers(1, 40), st.floats(0.5, 6))
def test_a_straight_flow_ends_at_the_data(solver, steps, shift):
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    path = Trajectory(noise, sample_grid(steps, shift).tolist(), solver)
    while path.evaluations:
        path.advance(data - noise)
        torch.testing.assert_close(path.data(), data, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path.x, data, rtol=1e-4, atol=1e-4)
    assert path.t == 1


@given(st.lists(st.tuples(names, st.integers(1, 12)), min_size=1, max_size=6), st.integers(1, 6))
def test_a_sample_ends_where_it_would_alone(kinds, group):
    def paths():
        torch.manual_seed(5)
        starts = torch.randn(len(kinds), 2, 3)
        return [
            Trajectory(x, sample_grid(steps, 3.0).tolist(), solver)
            for x, (solver, steps) in zip(starts, kinds, strict=True)
        ]

    alone = [finish([path])[0] for path in paths()]
    for x, end in zip(finish(paths(), group), alone, strict=True):
        torch.testing.assert_close(x, end)


@given(names, st.integers(1, 20))
def test_whole_steps_and_evaluations_are_counted(solver, steps):
    path = Trajectory(torch.zeros(1), sample_grid(steps, 3.0).tolist(), solver)
    each, seen = evaluations_per_step(solver), []
    for done in range(steps * each):
        assert path.evaluations == steps * each - done
        assert path.step == done // each
        if path.advance(torch.ones(1)):
            seen.append(path.step)
    assert seen == list(range(1, steps + 1))
    assert path.evaluations == 0


def test_a_solver_that_is_not_there_is_named():
    with pytest.raises(InputError, match="euler, heun, multistep, not 'ddim'"):
        Trajectory(torch.zeros(1), [0.0, 1.0], "ddim")
