"""Random numbers by counter: each a function of a key and a place, on any device the same bits.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") by torch's integer
arithmetic, and the Box-Muller transform of it. Logarithm, sine and cosine are summed here out of
fp64 operations that IEEE 754 rounds alike everywhere; a device's own differ in last bits.
"""

import hashlib
import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# Terms of the series, enough for fp64 in the ranges below.
_TERMS_OF_LOG, _TERMS_OF_TURN = 11, 9


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Four random words ``[..., 4]`` for each counter.

    Args:
        counter: ``[..., 4]`` int64, words from 0 to 2^32 - 1.
        key: two such words.
    """
    a, b, c, d = counter.unbind(-1)
    low, high = key
    for number in range(ROUNDS):
        if number:
            low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
        # Products of 64 bits wrap into int64's sign, and their bits are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ low,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ high,
            first & _WORD,
        )
    return torch.stack([a, b, c, d], dim=-1)


def key_of(*parts: int | str) -> tuple[int, int]:
    """A key by a hash of ``parts``, such as a seed and a purpose."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return value & _WORD, value >> 32


def normal_at(key: tuple[int, int], places: Tensor, count: int) -> Tensor:
    """Standard normal fp32 numbers ``[B, count]``, on the device of ``places``.

    A number depends on the key, its place and its column alone.

    Args:
        places: ``[B]`` int64, not negative.
    """
    blocks = torch.arange(-(-count // 4), device=places.device)
    size = (len(places), len(blocks))
    low, high = (places & _WORD)[:, None].expand(size), (places >> 32)[:, None].expand(size)
    counter = torch.stack([low, high, blocks.expand(size), torch.zeros_like(low)], dim=-1)
    words = philox(counter, key)
    pairs = _box_muller(words[..., 0::2], words[..., 1::2])
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count].float()


def _box_muller(radii: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers for each pair of words, fp64 (Box and Muller 1958)."""
    # From 2^-33 to 1 - 2^-33: never 0.
    radius = (-2 * _log((radii.double() + 0.5) * 2.0**-32)).sqrt()
    cosine, sine = _turn(turns)
    return radius * cosine, radius * sine


def _log(x: Tensor) -> Tensor:
    """The natural logarithm of fp64 numbers from 2^-33 to 1.

    Of ``x = m 2^e`` with m near 1 it is ``e ln 2 + 2 artanh((m - 1) / (m + 1))``.
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, 2 * mantissa, mantissa)
    exponent = exponent.double() - small.double()
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    total = torch.full_like(s, 1 / (2 * _TERMS_OF_LOG - 1))
    for term in reversed(range(_TERMS_OF_LOG - 1)):
        total = total * square + 1 / (2 * term + 1)
    return exponent * math.log(2) + 2 * s * total


def _turn(words: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``(word + 1/2) / 2^32`` turns, fp64, by their Taylor series.

    The upper two bits are the quadrant, of which no angle is further than an eighth of a turn from
    its middle.
    """
    quadrant = words >> 30
    angle = ((words & 0x3FFFFFFF).double() + 0.5 - 2.0**29) * (2 * math.pi * 2.0**-32)
    square = angle * angle
    even = torch.full_like(angle, _inverse_factorial(2 * _TERMS_OF_TURN))
    odd = torch.full_like(angle, _inverse_factorial(2 * _TERMS_OF_TURN + 1))
    for term in reversed(range(_TERMS_OF_TURN)):
        even = even * square + _inverse_factorial(2 * term)
        odd = odd * square + _inverse_factorial(2 * term + 1)
    cosine, sine = even, odd * angle
    # The middle of the first quadrant is an eighth of a turn.
    half = math.sqrt(0.5)
    cosine, sine = half * (cosine - sine), half * (cosine + sine)
    flipped = quadrant % 2 == 1  # a quarter of a turn more: (c, s) becomes (-s, c)
    cosine, sine = torch.where(flipped, -sine, cosine), torch.where(flipped, cosine, sine)
    sign = torch.where(quadrant >= 2, -1.0, 1.0).double()
    return cosine * sign, sine * sign


def _inverse_factorial(number: int) -> float:
    """``(-1)^(number // 2) / number!``, as the series of cosine and sine have it."""
    return (-1.0) ** (number // 2) / math.factorial(number)
