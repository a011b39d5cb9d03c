"""Random numbers by counter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyflux.util.philox import _log as logarithm
from tinyflux.util.philox import _turn as turn
from tinyflux.util.philox import key_of, normal_at, philox

WORD = 2**32
# Lines "philox4x32 10" of Random123 1.14's tests/kat_vectors: counter, key, and what comes out.
KNOWN = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN.split("\n")[1:-1])
def test_philox_gives_the_published_numbers(line):
    words = [int(word, 16) for word in line.split()]
    counter, key, expected = words[:4], words[4:6], words[6:]
    assert philox(torch.tensor(counter), tuple(key)).tolist() == expected
    both = torch.tensor([[0, 1, 2, 3], counter])
    assert philox(both, tuple(key))[1].tolist() == expected


@given(
    places=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
    count=st.integers(1, 13), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_number_is_a_matter_of_its_key_its_place_and_its_column(places, count, seed):
    key = key_of(seed, "noise")
    together = normal_at(key, torch.tensor(places), count)
    assert together.shape == (len(places), count)
    assert together.isfinite().all()
    for row, place in enumerate(places):
        assert torch.equal(normal_at(key, torch.tensor([place]), 16)[0, :count], together[row])
    assert len({tuple(row) for row in together.tolist()}) == len(places)
    assert not torch.equal(normal_at(key_of(seed, "other"), torch.tensor(places), count), together)


def test_the_numbers_are_normal():
    found = normal_at(key_of(0, "noise"), torch.arange(100), 2000).double()
    count = found.numel()
    # Within five standard errors of each moment.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(found.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    share = torch.tensor([(found < edge).double().mean() for edge in (-3, -2, -1, 0, 1, 2, 3)])
    expected = torch.special.ndtr(torch.arange(-3, 4).double())
    assert (share - expected.float()).abs().max() < 5 * 0.5 / math.sqrt(count)
    for one, other in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


def test_logarithm_and_angles_are_those_of_torch():
    drawn = torch.randint(WORD, (20_000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([drawn, torch.tensor([0, WORD - 1, *(n * 2**29 + d for n in range(1, 8)
                                                           for d in (-1, 0, 1))])])  # fmt: skip
    x = (words.double() + 0.5) / WORD
    torch.testing.assert_close(logarithm(x), x.log(), rtol=1e-15, atol=0)
    cosine, sine = turn(words)
    torch.testing.assert_close(cosine, (2 * math.pi * x).cos(), rtol=0, atol=2e-15)
    torch.testing.assert_close(sine, (2 * math.pi * x).sin(), rtol=0, atol=2e-15)


def test_the_bits_stay():
    found = normal_at(key_of(7, "noise"), torch.tensor([0, 2**40 + 5]), 6)
    assert [[value.hex() for value in row] for row in found.tolist()] == BITS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_bits():
    key, places = key_of(3, "noise"), torch.arange(64) * 2**33
    here = normal_at(key, places, 16 * 64 * 64)
    assert torch.equal(normal_at(key, places.cuda(), 16 * 64 * 64).cpu(), here)


BITS = [
    [
        "0x1.d3ab3a0000000p-2",
        "0x1.1f3f6c0000000p+0",
        "-0x1.dbb89e0000000p-4",
        "-0x1.4c6d200000000p+0",
        "0x1.a33aa80000000p-2",
        "-0x1.03b54e0000000p+0",
    ],
    [
        "-0x1.a3e15e0000000p-1",
        "0x1.7a2d820000000p+0",
        "0x1.45e9000000000p-1",
        "-0x1.40dc460000000p-1",
        "-0x1.f36f040000000p-2",
        "-0x1.3d2f700000000p-1",
    ],
]
