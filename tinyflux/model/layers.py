"""Norms and the MLP that the student's blocks are made of.

Shape legend: B batch, S tokens, D hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis (Zhang & Sennrich 2019), computed in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / rms(x)`` over the last axis, computed in fp32, returned in ``x``'s dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, hidden_size: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` with ``[B, D]`` shift and scale over ``[B, S, D]``."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLayerNorm(nn.Module):
    """RMS norm whose shift, scale and gates come from the conditioning vector (DiT's AdaLN).

    Args:
        chunks: 3 for (shift, scale, gate), 6 for attention's three followed by the MLP's.
    """

    def __init__(self, hidden_size: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)
        self.norm = RMSNorm(hidden_size)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``x`` ``[B, S, D]`` normed and modulated, and the chunks ``[B, D]`` not used for it."""
        shift, scale, *rest = self.linear(F.silu(vec)).chunk(self.chunks, dim=-1)
        return modulate(self.norm(x), shift, scale), tuple(rest)
