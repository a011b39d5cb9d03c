"""The student's attention, within one stream and over two, and what Sol tells it.

Shape legend: B batch, N image tokens, L text tokens, S = L + N, D hidden width, H heads, E head
width. ``seen`` is ``[B, 1, 1, S]`` bool, which keys attention reads; None means all.
Parameter names are those of the published v4.2 checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyflux.model.embeddings import apply_rotary
from tinyflux.model.layers import RMSNorm


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
