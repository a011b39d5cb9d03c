"""What time and position are to the student.

Shape legend: B batch, S tokens, D hidden width, H heads, E head width.
"""

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features ``[B, dim]`` of times ``t`` ``[B]``, in fp32 (Vaswani et al. 2017)."""
    half = dim // 2
    exponent = torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Times ``[B]`` to vectors ``[B, D]``.

    Args:
        scale: what times in [0, 1] are multiplied by. The embedding's slowest waves turn once in
            60,000: of times up to 1 most of them see a constant, of times up to 1,000 (as in FLUX
            and SD3) they do not.
    """

    def __init__(self, hidden_size: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        # fp32 until here: neighbouring times are the same number in bf16.
        features = timestep_embedding(t if self.scale == 1 else t.float() * self.scale)
        vector: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return vector


class RotaryEmbedding(nn.Module):
    """Axial rotary tables (Su et al. 2021, arXiv:2104.09864), always in fp32.

    Args:
        axes_dims: channels of a head given to each position axis; their sum is the head width.
    """

    def __init__(self, axes_dims: tuple[int, ...], theta: int):
        super().__init__()
        self.axes_dims, self.theta = axes_dims, theta

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``[..., S, axes]`` to cosines and sines, each ``[..., 1, S, E / 2]``."""
        angles = []
        for axis, dim in enumerate(self.axes_dims):
            exponent = torch.arange(0, dim, 2, device=ids.device, dtype=torch.float32) / dim
            angles.append(ids[..., axis, None].float() / self.theta**exponent)
        table = torch.cat(angles, dim=-1).unsqueeze(-3)
        return table.cos(), table.sin()


def apply_rotary(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring channel pairs of ``x`` ``[B, H, S, E]``; fp32 inside."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
