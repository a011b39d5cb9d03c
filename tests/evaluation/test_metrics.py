"""Metrics of features: their laws, exact small cases, and other libraries' numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from tinyflux.errors import InputError
from tinyflux.evaluation.captions import clip_score, retrieval
from tinyflux.evaluation.estimate import mean_estimate, share_estimate
from tinyflux.evaluation.frechet import fid
from tinyflux.evaluation.manifolds import manifolds
from tinyflux.evaluation.mmd import cmmd, kid

seeds = st.integers(0, 2**31)


def normal(count, width=8, seed=0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


class Features(torch.nn.Module):
    """Stands where torchmetrics has a network: its pictures are the features."""

    num_features = 8

    def forward(self, pictures):
        return pictures.flatten(1)


def filled(metric, drawn, real):
    metric.update(real[:, :, None, None], real=True)
    metric.update(drawn[:, :, None, None], real=False)
    return metric.compute()


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kid_is_torchmetrics():
    drawn, real = normal(70, shift=0.3), normal(70, seed=1)
    theirs = KernelInceptionDistance(Features(), subsets=1, subset_size=70, normalize=True)
    mean, _ = filled(theirs, drawn, real)
    assert kid(drawn, real).value == pytest.approx(mean.item(), abs=1e-4)


def test_fid_is_torchmetrics():
    drawn, real = normal(300, shift=0.3) * 1.5, normal(200, seed=1)
    theirs = FrechetInceptionDistance(Features(), normalize=True, input_img_size=(8, 1, 1))
    assert fid(drawn, real).value == pytest.approx(filled(theirs, drawn, real).item(), abs=1e-4)


def test_fid_of_known_gaussians():
    x = normal(500, 4)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    # Means 3 apart and deviations 1 and 2 in each of four dimensions: 9 + 4 (2 - 1)^2.
    moved = 2 * x + torch.tensor([3.0, 0, 0, 0])
    assert fid(moved, x).value == pytest.approx(13.0, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_distances_do_not_depend_on_order_and_are_symmetric(seed):
    drawn, real = normal(20, seed=seed, shift=0.5), normal(25, seed=seed + 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    for metric in (kid, cmmd, fid):
        value = metric(drawn, real).value
        assert metric(drawn[order], real).value == pytest.approx(value, abs=1e-9)
        assert metric(real, drawn).value == pytest.approx(value, abs=1e-9)
    assert manifolds(drawn[order], real) == manifolds(drawn, real)
    assert manifolds(drawn, real).precision.value == manifolds(real, drawn).recall.value


def brute_kid(drawn, real):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / len(a) + 1) ** 3

    def within(rows):
        pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = [kernel(a, b) for a in drawn for b in real]
    return within(drawn) + within(real) - 2 * sum(between) / len(between)


def brute_cmmd(drawn, real):
    drawn, real = (normalize(part.double(), dim=1) for part in (drawn, real))

    def mean(one, other):
        squares = [((a - b) ** 2).sum().item() for a in one for b in other]
        return sum(math.exp(-square / 200) for square in squares) / len(squares)

    return 1000 * (mean(drawn, drawn) + mean(real, real) - 2 * mean(drawn, real))


@pytest.mark.parametrize(("metric", "brute"), [(kid, brute_kid), (cmmd, brute_cmmd)])
def test_kernel_distances_and_jackknife_are_those_of_their_definitions(metric, brute):
    drawn, real = normal(7, shift=1.0).double(), normal(5, seed=1).double()
    made = metric(drawn, real)
    assert made.value == pytest.approx(brute(drawn, real), abs=1e-9)
    variance = 0.0
    for rows, without in (
        (drawn, lambda kept: brute(drawn[kept], real)),
        (real, lambda kept: brute(drawn, real[kept])),
    ):
        left = [without([j for j in range(len(rows)) if j != index]) for index in range(len(rows))]
        mean = sum(left) / len(left)
        variance += (len(left) - 1) / len(left) * sum((value - mean) ** 2 for value in left)
    assert made.high - made.value == pytest.approx(1.959964 * variance**0.5, rel=1e-5)
    assert made.value - made.low == pytest.approx(made.high - made.value)


def test_kernel_blocks_change_nothing(monkeypatch):
    drawn, real = normal(23, shift=0.4), normal(9, seed=1)
    whole = [metric(drawn, real) for metric in (kid, cmmd, manifolds)]
    monkeypatch.setattr("tinyflux.evaluation.mmd.BLOCK", 4)
    monkeypatch.setattr("tinyflux.evaluation.manifolds.BLOCK", 4)
    parts = [metric(drawn, real) for metric in (kid, cmmd, manifolds)]
    for one, other in zip(whole[:2], parts[:2], strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-10)
        assert one.low == pytest.approx(other.low, abs=1e-10)
    assert whole[2] == parts[2]


def test_kid_of_one_distribution_is_0_within_its_interval_nearly_always():
    inside = 0
    for seed in range(100):
        made = kid(normal(60, seed=2 * seed), normal(60, seed=2 * seed + 1))
        inside += made.low <= 0 <= made.high
    assert inside >= 95  # the jackknife is wide where there is no difference
    assert kid(normal(60, shift=0.7), normal(60, seed=1)).low > 0


def test_fid_with_fewer_pictures_than_features_says_so():
    few = fid(normal(8), normal(300, seed=1))
    assert "8 pictures are too few for the covariance of 8 features" in few.note
    assert not fid(normal(9), normal(300, seed=1)).note


def test_manifolds_of_four_on_a_line():
    """Real pictures at 0, 1, 2, 10; with k = 1 their balls reach 1, 1, 1 and 8 far."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # In the balls of 0 and 1; in that of 10 alone; in none. The drawn balls reach 4.5, 4.5, 15.
    drawn = torch.tensor([[0.5], [5.0], [20.0]])
    made = manifolds(drawn, real, pr_neighbours=1, dc_neighbours=1)
    assert made.precision.value == pytest.approx(2 / 3)
    assert made.density.value == pytest.approx((2 + 1 + 0) / 3)
    assert made.coverage.value == pytest.approx(3 / 4)  # the ball of 2 is empty
    assert made.recall.value == 1.0


def test_manifolds_of_copies_and_of_strangers():
    real = normal(30)
    same = manifolds(real.clone(), real)
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)
    assert same.density.value >= 1
    far = manifolds(real + 100, real)
    assert (far.precision.value, far.recall.value, far.density.value, far.coverage.value) == (
        0, 0, 0, 0,
    )  # fmt: skip


def test_one_picture_again_and_again_is_precise_and_covers_nothing():
    real = normal(50)
    made = manifolds(real[:1].repeat(50, 1), real)
    assert made.precision.value == 1.0
    assert made.recall.value < 0.1
    assert made.coverage.value < 0.5


def test_clip_score_is_a_hundred_cosines():
    captions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    pictures = torch.tensor([[5.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    made = clip_score(pictures, captions)
    assert made.value == pytest.approx(100 * (1 + math.sqrt(0.5) + 0) / 3, abs=1e-4)


def test_retrieval_finds_own_captions_and_takes_equal_captions_for_one():
    captions = torch.eye(4)[[0, 1, 2, 2]]
    texts = ["a", "b", "c", "c"]
    assert retrieval(captions, captions, texts, among=4).value == 1.0
    turned = captions[[1, 0, 2, 2]]
    assert retrieval(turned, captions, texts, among=4).value == 0.5
    # A model that sees nothing finds nothing, and is not thanked for ties.
    assert retrieval(torch.ones(4, 4), captions, texts, among=4).value == 0.0


def test_retrieval_means_the_same_for_any_number_of_pictures():
    captions, texts = torch.eye(6), list("abcdef")
    made = retrieval(captions, captions, texts, among=4)
    assert (made.count, made.note) == (4, "")  # the last two are no whole group
    few = retrieval(captions[:3], captions[:3], texts[:3], among=4)
    assert few.count == 3
    assert "among 3 captions, not 4" in few.note


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_a_share_lies_in_its_interval_within_0_and_1(hits, misses):
    if hits + misses == 0:
        with pytest.raises(InputError):
            share_estimate(torch.zeros(0, dtype=torch.bool))
        return
    made = share_estimate(torch.tensor([True] * hits + [False] * misses))
    assert 0 <= made.low <= made.value <= made.high <= 1
    assert made.low < made.high


def test_intervals_of_known_cases():
    # Wilson's, 8 of 10, as in textbooks.
    made = share_estimate(torch.tensor([True] * 8 + [False] * 2))
    assert (made.low, made.high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    mean = mean_estimate(torch.tensor([1.0, 3.0]))
    assert (mean.low, mean.high) == (
        pytest.approx(2 - 1.96, abs=1e-3),
        pytest.approx(3.96, abs=1e-3),
    )
    assert mean_estimate(torch.tensor([1.0])).low is None


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="at least 3 drawn pictures, not 2"):
        kid(normal(2), normal(9))
    with pytest.raises(InputError, match="of 8 and of 7 dimensions"):
        fid(normal(9), normal(9, 7))
    with pytest.raises(InputError, match="real pictures hold values that are not finite"):
        kid(normal(9), normal(9) * math.nan)
    with pytest.raises(InputError, match="at least 6 real pictures"):
        manifolds(normal(9), normal(5))
    with pytest.raises(InputError, match="one shape"):
        clip_score(normal(3), normal(4))
    with pytest.raises(InputError, match="among at least 2"):
        retrieval(normal(3), normal(3), ["a", "b", "c"], among=1)
