from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tinyflux.inference.scheduler import Scheduler


@dataclass(eq=False)
class Job:
    arrival: int  # forwards done before it comes
    work: int
    size: str = "small"
    turns: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.turns[-1] + 1


jobs = st.builds(Job, st.integers(0, 60), st.integers(1, 30))
mixed = st.builds(Job, st.integers(0, 60), st.integers(1, 30), st.sampled_from("abc"))


def run(jobs, max_batch, cost=lambda batch: 1.0):
    """Serve ``jobs``; the batches."""
    turns, waiting, batches = Scheduler(max_batch), sorted(jobs, key=lambda job: job.arrival), []
    while waiting or len(turns):
        while waiting and (waiting[0].arrival <= len(batches) or not len(turns)):
            job = waiting.pop(0)
            turns.add(job, job.size, job.work)
        batch = turns.next()
        for job in batch:
            job.turns.append(len(batches))
        turns.charge(batch, cost(batch))
        batches.append(batch)
        assert len(batches) < 10_000
    return batches


def equal_sharing(jobs, max_batch):
    """When each job of one size ends if all that are there share the places equally."""
    left, ends, done = {job: float(job.work) for job in jobs}, {}, 0
    while left:
        active = [job for job in left if job.arrival <= done]
        done += 1
        for job in active:
            left[job] -= min(1.0, max_batch / len(active))
            if left[job] < 1e-9:
                ends[job] = done
                del left[job]
    return ends


@given(st.lists(mixed, min_size=1, max_size=25), st.integers(1, 5))
def test_every_sample_gets_its_evaluations_in_batches_of_one_size(jobs, max_batch):
    for batch in run(jobs, max_batch):
        assert 1 <= len(batch) == len(set(batch)) <= max_batch
        assert len({job.size for job in batch}) == 1
    assert all(len(job.turns) == job.work for job in jobs)


@given(st.lists(jobs, min_size=1, max_size=25), st.integers(1, 5))
def test_no_sample_waits_longer_than_under_equal_sharing(jobs, max_batch):
    jobs[0].arrival = 0
    run(jobs, max_batch)
    ends = equal_sharing(jobs, max_batch)
    for job in jobs:
        # Whole evaluations, and places that stand empty while the last ones finish.
        assert job.end <= ends[job] + job.work + 1
        if max_batch == 1:
            assert job.end <= ends[job] + 1


@given(st.lists(st.integers(0, 40), min_size=2, max_size=25), st.integers(1, 5))
def test_samples_that_are_alike_are_served_in_order_of_arrival(arrivals, max_batch):
    jobs = [Job(arrival, 7) for arrival in sorted(arrivals)]
    run(jobs, max_batch)
    ends = [job.end for job in jobs]
    assert ends == sorted(ends)


@given(st.integers(1, 4), st.integers(1, 30))
def test_a_short_sample_passes_long_ones(max_batch, arrival):
    long = [Job(0, 50) for _ in range(3 * max_batch)]
    short = Job(arrival, 2)
    run([*long, short], max_batch)
    assert short.end == arrival + 2


def test_short_samples_without_end_do_not_starve_a_long_one():
    long = Job(0, 30)
    short = [Job(2 * index, 1) for index in range(400)]
    run([long, *short], 1)
    assert long.end <= 62


def test_sizes_of_one_cost_take_turns():
    jobs = [Job(0, 20, "a"), Job(0, 20, "b"), Job(0, 20, "c")]
    run(jobs, 4)
    for job in jobs:
        assert [later - turn for turn, later in zip(job.turns, job.turns[1:], strict=False)] == (
            [3] * 19
        )


def test_a_cheap_size_gets_as_much_of_the_model_as_a_dear_one():
    cheap, dear = Job(0, 64, "cheap"), Job(0, 16, "dear")
    run([cheap, dear], 1, lambda batch: 4.0 if batch[0].size == "dear" else 1.0)
    assert abs(cheap.end - dear.end) <= 5


def test_a_size_that_comes_again_and_again_does_not_starve_the_others():
    steady = Job(0, 50, "a")
    again = [Job(index, 1, "b") for index in range(100)]
    run([steady, *again], 1)
    assert steady.end <= 110


@given(st.lists(mixed, min_size=2, max_size=12), st.integers(1, 3), st.data())
def test_those_held_or_removed_take_no_turn(jobs, max_batch, data):
    turns = Scheduler(max_batch)
    for job in jobs:
        turns.add(job, job.size, job.work)
    held = data.draw(st.sets(st.sampled_from(jobs)))
    gone = data.draw(st.sets(st.sampled_from(jobs)))
    for job in held:
        turns.hold(job, True)
    for job in gone:
        turns.remove(job)
        turns.remove(job)
    while batch := turns.next():
        assert not (held | gone) & set(batch)
        turns.charge(batch, 1.0)
    assert len(turns) == len(held - gone)
    for job in held:
        turns.hold(job, False)
    while batch := turns.next():
        turns.charge(batch, 1.0)
    assert len(turns) == 0
