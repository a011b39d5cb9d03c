"""What a comparison found, as ``comparison.json`` holds it."""

from dataclasses import dataclass

# By what share of the time that both trials of a pair had they are compared.
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Curve:
    """One metric of one trial over its training.

    Attributes:
        steps: optimizer steps after which it was looked at, rising.
        seconds: of training until then; validation, pictures and checkpoints are not counted.
        values: None where the metric was not finite.
    """

    steps: list[int]
    seconds: list[float]
    values: list[float | None]


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial.

    Attributes:
        seed: by which it is paired; ``run_seed`` is the run's own.
        run_dir: below the comparison's directory.
        machine: on which it was trained last, in ``threads`` threads.
        seconds: of training, all steps.
        curves: by metric.
    """

    arm: str
    seed: int
    run_seed: int
    run_dir: str
    machine: str
    threads: int
    seconds: float
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Difference:
    """An arm's metric less another's, paired by seed.

    Attributes:
        by_seed: in the order of the comparison's seeds; None where one of the two was not finite.
        mean: of them; None if one of them is None.
        half_width: of the 95% t-interval of the mean; None for a single seed.
        detectable: the size of an effect that this many seeds of this spread tell from zero in four
            of five comparisons; None for a single seed.
    """

    by_seed: list[float | None]
    mean: float | None
    half_width: float | None
    detectable: float | None

    @property
    def includes_zero(self) -> bool | None:
        """Whether the interval does; None where there is none."""
        if self.mean is None or self.half_width is None:
            return None
        return abs(self.mean) <= self.half_width


@dataclass(frozen=True)
class Reached:
    """Where an arm was when it first had the last value of what it is compared to, by seed.

    Attributes:
        steps: None where it never had; between two looks, along the line between them.
        seconds: of training.
        other_steps: steps that the other trained to have it. other_seconds: likewise.
    """

    steps: list[float | None]
    seconds: list[float | None]
    other_steps: list[int]
    other_seconds: list[float]


@dataclass(frozen=True)
class Comparison:
    """An arm against another by one metric.

    Attributes:
        paired: whether both have the same first weights, data, times and noise.
        steps: at which both were looked at with every seed; ``at_steps`` are the differences.
        seconds: training time, mean over seeds, at the :data:`SHARES` of the time that both trials
            of a pair had; ``at_seconds`` are the differences there.
        verdict: the difference at the last step in plain words.
        clock_verdict: that at the end of the time that both had.
    """

    arm: str
    to: str
    metric: str
    paired: bool
    steps: list[int]
    at_steps: list[Difference]
    seconds: list[float]
    at_seconds: list[Difference]
    reached: Reached
    verdict: str
    clock_verdict: str


@dataclass(frozen=True)
class ArmRecord:
    """An arm's settings, beside those of all.

    Attributes:
        settings: in which it differs from the base.
        control_of: the arm whose control it is.
        seed_offset: added to the seeds of the comparison.
    """

    name: str
    settings: dict[str, str]
    control_of: str | None
    seed_offset: int


@dataclass(frozen=True)
class CompareRecord:
    """A whole comparison.

    Attributes:
        metric: the one that was named before the run; ``metrics`` are all, with it first.
        steps: that each trial trained.
        batch_size: samples per step.
        settings: of every arm, over those of ``base``, the run file.
        rows: samples that the base trained on, and ``held_out`` those that it did not.
        stages: seconds of each stage in the last start of the command; what an earlier one had
            finished took none.
    """

    name: str
    metric: str
    metrics: list[str]
    lower_is_better: bool
    seeds: list[int]
    steps: int
    batch_size: int
    base: str | None
    settings: dict[str, str]
    rows: int
    held_out: int
    arms: list[ArmRecord]
    trials: list[TrialRecord]
    comparisons: list[Comparison]
    stages: dict[str, float]

    def of(self, arm: str) -> list[TrialRecord]:
        """An arm's trials in the order of the seeds."""
        return [trial for trial in self.trials if trial.arm == arm]

    def against(self, metric: str) -> list[Comparison]:
        """The comparisons by one metric."""
        return [one for one in self.comparisons if one.metric == metric]
