"""The parts of the student's blocks.

Shape legend: B batch, N image tokens, L text tokens, S = L + N, D hidden width, H heads, E head
width. ``seen`` is ``[B, 1, 1, S]`` bool, which keys attention reads; None means all.
Parameter names are those of the published v4.2 checkpoints.
"""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class AttentionPrior:
    """What the Sol expert tells every attention layer.

    Attributes:
        temperature: ``[B]``; the logits of image queries are divided by it.
        spatial: ``[B, 1, h, w]``, importance of each image token, on the image's own grid.
    """

    temperature: Tensor
    spatial: Tensor


class SpatialModulation(nn.Conv2d):
    """Importance map to a factor per head and image token, 1 before training."""

    def __init__(self, num_heads: int):
        super().__init__(1, num_heads, kernel_size=1)

    def forward(self, spatial: Tensor) -> Tensor:
        """``[B, 1, h, w]`` to ``[B, H, N, 1]``, within ``exp(+-2)``."""
        return super().forward(spatial).flatten(2).clamp(-2, 2).exp().unsqueeze(-1)


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, S, 3 D]`` to query, key and value, each ``[B, H, S, E]``."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _merge_heads(x: Tensor) -> Tensor:
    """``[B, H, S, E]`` to ``[B, S, D]``."""
    return x.transpose(1, 2).flatten(2)


def _cool(q: Tensor, prior: AttentionPrior | None) -> Tensor:
    """Queries divided by their sample's temperature: the logits are then, too."""
    if prior is None:
        return q
    return q / prior.temperature.to(q.dtype)[:, None, None, None]


class QKNorm(nn.Module):
    """RMS norm of each head's queries and keys (Henry et al. 2020, arXiv:2010.04245).

    It bounds attention's logits, which otherwise grow with the rate (Dehghani et al. 2023).
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, H, S, E]``, normed."""
        return self.query_norm(q), self.key_norm(k)


class Attention(nn.Module):
    """Self-attention over text and image tokens in one sequence, text first."""

    def __init__(self, hidden_size: int, num_heads: int, use_prior: bool, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qk_norm = QKNorm(hidden_size // num_heads) if qk_norm else None
        if use_prior:
            self.spatial_to_mod = SpatialModulation(num_heads)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        prior: AttentionPrior | None,
        num_text: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        q, k, v = _split_heads(self.qkv(x), self.num_heads)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        if prior is not None:
            factor = self.spatial_to_mod(prior.spatial).to(q.dtype)
            factor = F.pad(factor, (0, 0, num_text, 0), value=1.0)
            q, k = q * factor, k * factor
        out = F.scaled_dot_product_attention(_cool(q, prior), k, v, attn_mask=seen)
        projected: Tensor = self.out_proj(_merge_heads(out))
        return projected


class TextQKV(nn.Linear):
    """The text stream's projection to query, key and value."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 3 * hidden_size, bias=False)


class JointAttention(nn.Module):
    """Text and image attend to both streams; Sol guides the image's queries only."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        use_prior: bool,
        own_text_qkv: bool,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.txt_qk_norm = QKNorm(hidden_size // num_heads) if qk_norm else None
        self.img_qk_norm = QKNorm(hidden_size // num_heads) if qk_norm else None
        if own_text_qkv:
            self.txt_qkv = TextQKV(hidden_size)
        self.img_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.txt_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.img_out = nn.Linear(hidden_size, hidden_size, bias=False)
        if use_prior:
            self.spatial_to_mod = SpatialModulation(num_heads)

    def forward(
        self,
        txt_qkv: Tensor,
        img: Tensor,
        rope: tuple[Tensor, Tensor],
        prior: AttentionPrior | None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_text = txt_qkv.shape[1]
        txt_q, txt_k, txt_v = _split_heads(txt_qkv, self.num_heads)
        img_q, img_k, img_v = _split_heads(self.img_qkv(img), self.num_heads)
        if self.txt_qk_norm is not None and self.img_qk_norm is not None:
            txt_q, txt_k = self.txt_qk_norm(txt_q, txt_k)
            img_q, img_k = self.img_qk_norm(img_q, img_k)
        img_q, img_k = apply_rotary(img_q, rope), apply_rotary(img_k, rope)
        if prior is not None:
            factor = self.spatial_to_mod(prior.spatial).to(img_q.dtype)
            img_q, img_k = img_q * factor, img_k * factor
        # The temperature is one number per sample, so it folds into the image's queries and both
        # streams share one attention call.
        q = torch.cat([txt_q, _cool(img_q, prior)], dim=2)
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        out = _merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return self.txt_out(out[:, :num_text]), self.img_out(out[:, num_text:])


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


class DoubleStreamBlock(nn.Module):
    """Text and image with their own weights, joined in attention."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        use_prior: bool,
        own_text_qkv: bool,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.img_norm1 = AdaLayerNorm(hidden_size, chunks=6)
        self.txt_norm1 = AdaLayerNorm(hidden_size, chunks=6)
        self.attn = JointAttention(hidden_size, num_heads, use_prior, own_text_qkv, qk_norm)
        self.img_norm2 = RMSNorm(hidden_size)
        self.txt_norm2 = RMSNorm(hidden_size)
        self.img_mlp = MLP(hidden_size, mlp_ratio)
        self.txt_mlp = MLP(hidden_size, mlp_ratio)

    def forward(
        self,
        txt: Tensor,
        img: Tensor,
        vec: Tensor,
        rope: tuple[Tensor, Tensor],
        prior: AttentionPrior | None,
        shared_txt_qkv: TextQKV | None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        img_in, (img_gate, *img_mod, img_mlp_gate) = self.img_norm1(img, vec)
        txt_in, (txt_gate, *txt_mod, txt_mlp_gate) = self.txt_norm1(txt, vec)
        txt_qkv = self.attn.txt_qkv if shared_txt_qkv is None else shared_txt_qkv
        txt_out, img_out = self.attn(txt_qkv(txt_in), img_in, rope, prior, seen)

        txt = txt + txt_gate[:, None] * txt_out
        img = img + img_gate[:, None] * img_out
        txt_hidden = self.txt_mlp(modulate(self.txt_norm2(txt), *txt_mod))
        img_hidden = self.img_mlp(modulate(self.img_norm2(img), *img_mod))
        return txt + txt_mlp_gate[:, None] * txt_hidden, img + img_mlp_gate[:, None] * img_hidden


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence with one set of weights.

    Args:
        gated_mlp: scale the MLP's output by a gate from the conditioning vector, 0 at first, as
            attention's is; otherwise the MLP knows the time from its input alone.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        use_prior: bool,
        qk_norm: bool = False,
        gated_mlp: bool = False,
    ):
        super().__init__()
        self.norm = AdaLayerNorm(hidden_size, chunks=4 if gated_mlp else 3)
        self.attn = Attention(hidden_size, num_heads, use_prior, qk_norm)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = MLP(hidden_size, mlp_ratio)

    def forward(
        self,
        x: Tensor,
        vec: Tensor,
        rope: tuple[Tensor, Tensor],
        prior: AttentionPrior | None,
        num_text: int,
        seen: Tensor | None = None,
    ) -> Tensor:
        x_in, (gate, *mlp_gates) = self.norm(x, vec)
        x = x + gate[:, None] * self.attn(x_in, rope, prior, num_text, seen)
        out: Tensor = self.mlp(self.norm2(x))
        for mlp_gate in mlp_gates:
            out = mlp_gate[:, None] * out
        return x + out
