"""TinyFluxDeep, the student: a rectified-flow transformer guided by two distilled experts."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyflux.errors import InputError
from tinyflux.model.attention import AttentionPrior, SpatialModulation, TextQKV
from tinyflux.model.blocks import DoubleStreamBlock, SingleStreamBlock
from tinyflux.model.config import TinyFluxConfig
from tinyflux.model.embeddings import RotaryEmbedding, TimestepEmbedder
from tinyflux.model.experts import LunePredictor, SolPrior, SolUnits
from tinyflux.model.layers import AdaLayerNorm, RMSNorm
from tinyflux.model.presets import PRESETS, preset

__all__ = ["PRESETS", "TinyFluxConfig", "TinyFluxDeep", "preset"]

# Tensors that published checkpoints carry and no forward reads.
UNUSED_PUBLISHED_PREFIXES = ("rope.freqs_", "sol_prior.spatial_to_qk_scale.")


class TinyFluxDeep(nn.Module):
    """Predicts the velocity ``data - noise`` of noised latents.

    Time runs from 0 (noise) to 1 (data). Image and text pass ``num_double_layers`` blocks with
    weights of their own, then ``num_single_layers`` blocks as one sequence. A conditioning vector
    (time, pooled CLIP, pooled T5, the Lune expert) modulates every block; the Sol expert sets the
    temperature of image queries and weighs image tokens.
    """

    def __init__(self, config: TinyFluxConfig):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads

        self.img_in = nn.Linear(config.token_channels, width)
        self.txt_in = nn.Linear(config.t5_hidden_size, width)
        self.time_in = TimestepEmbedder(width, config.time_scale)
        self.vector_in = nn.Sequential(nn.SiLU(), nn.Linear(config.pooled_projection_dim, width))
        if config.use_t5_vec:
            self.t5_pool = nn.Sequential(
                nn.Linear(config.t5_hidden_size, width), nn.SiLU(), nn.Linear(width, width)
            )
            self.text_balance = nn.Parameter(torch.zeros(()))  # sigmoid: CLIP and T5 alike

        self._add_experts(config)
        self.rope = RotaryEmbedding(config.axes_dims_rope, config.theta)
        if config.use_cross_attention_sharing:
            self.txt_qkv = TextQKV(width)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(
                width,
                heads,
                config.mlp_ratio,
                use_prior=config.use_sol_prior,
                own_text_qkv=not config.use_cross_attention_sharing,
                qk_norm=config.qk_norm,
            )
            for _ in range(config.num_double_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(
                width,
                heads,
                config.mlp_ratio,
                use_prior=config.use_sol_prior,
                qk_norm=config.qk_norm,
                gated_mlp=config.gated_single_mlp,
            )
            for _ in range(config.num_single_layers)
        )
        self.final_norm = RMSNorm(width)
        self.final_linear = nn.Linear(width, config.token_channels)

        self.gradient_checkpointing = False
        self._init_weights()
        if config.use_lune_expert and config.freeze_lune:
            self.lune_predictor.requires_grad_(False)
        if config.use_sol_prior and config.freeze_sol:
            self.sol_prior.requires_grad_(False)

    def _add_experts(self, config: TinyFluxConfig) -> None:
        if config.use_lune_expert:
            self.lune_predictor = LunePredictor(
                hidden_size=config.hidden_size,
                pooled_dim=config.pooled_projection_dim,
                expert_dim=config.lune_expert_dim,
                width=config.lune_hidden_dim,
                dropout=config.lune_dropout,
            )
        if config.use_sol_prior:
            self.sol_prior = SolPrior(
                hidden_size=config.hidden_size,
                pooled_dim=config.pooled_projection_dim,
                width=config.sol_hidden_dim,
                num_heads=config.num_attention_heads,
                spatial_size=config.sol_spatial_size,
                num_stats=config.sol_num_stats,
                geometric_weight=config.sol_geometric_weight,
                standardize=config.sol_standardize,
            )

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Blocks start as identities (adaLN-Zero, Peebles & Xie 2022) and the velocity at zero.
        for module in self.modules():
            if isinstance(module, AdaLayerNorm):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, SpatialModulation):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.final_linear.weight)
        if self.sol_units is not None:
            # Predictions start at the mean, of which nothing has to be learnt.
            for predictor in (self.sol_prior.stat_predictor, self.sol_prior.spatial_predictor):
                nn.init.zeros_(predictor[-1].weight)  # type: ignore[arg-type]

    @property
    def sol_units(self) -> SolUnits | None:
        """The units of Sol's features, or None if the model takes them as they are."""
        return self.sol_prior.units if self.config.use_sol_prior else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        lune_features: Tensor | None = None,
        sol_stats: Tensor | None = None,
        sol_spatial: Tensor | None = None,
        return_expert_pred: bool = False,
        *,
        lune_mask: Tensor | None = None,
        sol_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        return_blocks: Collection[int] = (),
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predict the velocity of noised latents.

        Args:
            hidden_states: ``[B, N, C]`` noised latents as tokens, row by row, from
                :func:`~tinyflux.model.packing.pack_latents`.
            encoder_hidden_states: ``[B, L, t5_hidden_size]`` text embeddings.
            pooled_projections: ``[B, pooled_projection_dim]`` pooled CLIP embeddings.
            timestep: ``[B]`` in [0, 1], 0 is noise.
            img_ids: ``[B, N, 3]`` or ``[N, 3]`` from :meth:`create_img_ids`; one grid per batch.
            lune_features: ``[B, lune_expert_dim]`` of the teacher, used instead of the prediction.
            sol_stats: ``[B, sol_num_stats]`` of the teacher.
            sol_spatial: ``[B, sol_spatial_size, sol_spatial_size]`` of the teacher.
            return_expert_pred: also return the experts' predictions, and what ``return_blocks``
                asks for.
            lune_mask, sol_mask: ``[B]`` bool, which samples use the teacher's features; default
                all.
            grid: ``(h, w)`` with ``h * w = N``. Left out it is read from ``img_ids``, which on a
                GPU waits for it; loops pass it.
            return_blocks: numbers of blocks, counted from 1 over the double and then the single
                ones, whose image tokens are in the dict as well.

        Returns:
            ``[B, N, C]`` velocity; with ``return_expert_pred`` also a dict of ``lune_pred``
            ``[B, lune_expert_dim]``, ``sol_stats_pred`` ``[B, sol_num_stats]`` and
            ``sol_spatial_pred`` ``[B, s, s]`` (those of the experts the model has), and
            :func:`tokens_after` each of ``return_blocks``, ``[B, N, hidden_size]``.

        Raises:
            InputError: shapes that do not fit the config or each other.
        """
        self._check_shapes(hidden_states, encoder_hidden_states, pooled_projections, timestep)
        ids = img_ids[0] if img_ids.ndim == 3 else img_ids
        if grid is None:
            rows, columns = (ids[:, 1:].amax(0) + 1).tolist()
            grid = (int(rows), int(columns))
        if ids.shape[0] != hidden_states.shape[1] or grid[0] * grid[1] != hidden_states.shape[1]:
            raise InputError(
                f"{hidden_states.shape[1]} image tokens do not fill the {grid[0]} x {grid[1]} grid "
                f"of img_ids {tuple(img_ids.shape)}"
            )
        dtype = self.img_in.weight.dtype
        text, pooled = encoder_hidden_states.to(dtype), pooled_projections.to(dtype)
        t = timestep.float()

        time_vec = self.time_in(t)
        vec = time_vec + self._text_vector(text, pooled)
        experts: dict[str, Tensor] = {}
        if self.config.use_lune_expert:
            signal, experts["lune_pred"] = self.lune_predictor(
                time_vec, pooled, lune_features, lune_mask
            )
            vec = vec + signal
        prior = None
        if self.config.use_sol_prior:
            temperature, spatial, experts["sol_stats_pred"], experts["sol_spatial_pred"] = (
                self.sol_prior(time_vec, pooled, t, sol_stats, sol_spatial, sol_mask)
            )
            spatial = F.interpolate(spatial[:, None].float(), grid, mode="bilinear")
            prior = AttentionPrior(temperature, spatial.to(dtype))

        img, txt = self.img_in(hidden_states.to(dtype)), self.txt_in(text)
        rope = self.rope(ids)
        seen = self._seen(text, img.shape[1])
        shared = self.txt_qkv if self.config.use_cross_attention_sharing else None
        for number, block in enumerate(self.double_blocks, start=1):
            txt, img = self._run(block, txt, img, vec, rope, prior, shared, seen)
            if number in return_blocks:
                experts[tokens_after(number)] = img

        num_text = txt.shape[1]
        # Text tokens stand at position 0 of every axis.
        rope = self.rope(F.pad(ids, (0, 0, num_text, 0)))
        x = torch.cat([txt, img], dim=1)
        for number, block in enumerate(self.single_blocks, start=len(self.double_blocks) + 1):
            x = self._run(block, x, vec, rope, prior, num_text, seen)
            if number in return_blocks:
                experts[tokens_after(number)] = x[:, num_text:]

        velocity = self.final_linear(self.final_norm(x[:, num_text:]))
        return (velocity, experts) if return_expert_pred else velocity

    def _text_vector(self, text: Tensor, pooled: Tensor) -> Tensor:
        """``[B, D]`` from pooled CLIP and T5 tokens weighed by the softmax of their mean."""
        clip_vec: Tensor = self.vector_in(pooled)
        if not self.config.use_t5_vec:
            return clip_vec
        logits = text.float().mean(-1)
        if self.config.text_padding == "zero":
            logits = logits.masked_fill(_padding(text), torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1).to(text.dtype)
        t5_vec = self.t5_pool((text * weights[..., None]).sum(1))
        return torch.lerp(t5_vec, clip_vec, self.text_balance.sigmoid().to(t5_vec.dtype))

    def _seen(self, text: Tensor, num_image: int) -> Tensor | None:
        """``[B, 1, 1, L + N]``, the keys that attention reads: all but the text's padding."""
        if not self.config.mask_text_padding:
            return None
        return F.pad(~_padding(text), (0, num_image), value=True)[:, None, None]

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _check_shapes(self, hidden: Tensor, text: Tensor, pooled: Tensor, t: Tensor) -> None:
        config, batch = self.config, hidden.shape[0]
        for name, tensor, want in (
            ("hidden_states", hidden, (batch, None, config.token_channels)),
            ("encoder_hidden_states", text, (batch, None, config.t5_hidden_size)),
            ("pooled_projections", pooled, (batch, config.pooled_projection_dim)),
            ("timestep", t, (batch,)),
        ):
            fits = tensor.ndim == len(want) and all(
                size is None or size == found
                for size, found in zip(want, tensor.shape, strict=True)
            )
            if not fits:
                shape = ", ".join("*" if size is None else str(size) for size in want)
                raise InputError(f"{name} must be [{shape}], not {list(tensor.shape)}")

    @staticmethod
    def create_img_ids(
        batch_size: int, h: int, w: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Positions ``[B, h * w, 3]`` as (0, row, column), row by row."""
        rows, columns = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        return ids.expand(batch_size, -1, -1)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.gradient_checkpointing = True

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that are not frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def tokens_after(block: int) -> str:
    """The name of the image tokens after a block, counted from 1, in a forward's dict."""
    return f"tokens_{block}"


def _padding(text: Tensor) -> Tensor:
    """``[B, L]``, which text embeddings are zeros and stand for no token."""
    return (text == 0).all(-1)
