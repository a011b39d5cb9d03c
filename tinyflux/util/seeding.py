"""Randomness that depends on what is drawn, never on who draws it or in which order.

Every draw names its purpose and its place, such as ``generator(seed, "noise", position)``. The same
names give the same numbers on any worker, batch size, device or day.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``parts``.

    CPU, because only there is the stream of a seed the same on every machine.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # torch takes seeds up to 2**64 - 1, but its Mersenne Twister reads only the lower half of a
    # larger one, so a full 64-bit hash is folded rather than truncated.
    seed = int.from_bytes(digest, "little")
    return torch.Generator().manual_seed((seed ^ (seed >> 32)) & 0x7FFFFFFFFFFFFFFF)


def randn_for(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal fp32 tensor of ``shape`` on the CPU, drawn by ``generator(*parts)``."""
    return torch.randn(tuple(shape), generator=generator(*parts))
