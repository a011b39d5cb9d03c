"""The student's two kinds of block.

Shape legend: B batch, N image tokens, L text tokens, S = L + N, D hidden width. ``seen`` is
``[B, 1, 1, S]`` bool, which keys attention reads; None means all. Parameter names are those of the
published v4.2 checkpoints.
"""

from torch import Tensor, nn

from tinyflux.model.attention import Attention, AttentionPrior, JointAttention, TextQKV
from tinyflux.model.layers import MLP, AdaLayerNorm, RMSNorm, modulate


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
