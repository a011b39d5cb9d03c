"""What the student learns from its two teachers, frozen SD1.5-class UNets.

Lune gives the mean of its mid block; Sol gives statistics of its self-attention and a map of where
attention goes. Both run in their own time convention: ``sigma = 1`` is noise and the UNet is told
``1000 * sigma``. The teacher for student time t runs at ``sigma = 1 - t``, on the same
``(1 - t) * noise + t * data``.

Shape legend: B batch, C latent channels, h x w latent grid, N tokens of an attention layer.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

SPATIAL_SIZE = 8
# Bytes that one chunk of attention rows may take, of all heads and samples.
_CHUNK_BYTES = 2**25


class SolFeatures(NamedTuple):
    """Sol's self-attention in numbers, fp32.

    Attributes:
        stats: ``[B, 4]``: locality, entropy, clustering, sparsity, each in [0, 1].
        spatial: ``[B, s, s]``, attention received by each place; sums to 1.
    """

    stats: Tensor
    spatial: Tensor


class _Stop(Exception):
    """Ends a UNet's forward once all that is wanted has been computed."""


def _run(unet: UNet2DConditionModel, latents: Tensor, sigma: Tensor, text: Tensor) -> None:
    """The UNet's forward, until a hook stops it."""
    dtype = next(unet.parameters()).dtype
    with suppress(_Stop):
        unet(latents.to(dtype), (1000 * sigma).float(), text.to(dtype), return_dict=False)


@torch.no_grad()
def lune_features(
    unet: UNet2DConditionModel, latents: Tensor, sigma: Tensor, text: Tensor
) -> Tensor:
    """Mean over space of the mid block's output, ``[B, width]`` in fp32.

    Nothing after the mid block is run.

    Args:
        latents: ``[B, C, h, w]``, noised to ``sigma`` ``[B]``.
        text: ``[B, T, D]`` CLIP hidden states.
    """
    found: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        found.append(output.float().mean(dim=(2, 3)))
        raise _Stop

    hook = unet.mid_block.register_forward_hook(keep)
    try:
        _run(unet, latents, sigma, text)
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def sol_features(
    unet: UNet2DConditionModel,
    latents: Tensor,
    sigma: Tensor,
    text: Tensor,
    spatial_size: int = SPATIAL_SIZE,
    query_chunk: int | None = None,
) -> SolFeatures:
    """Statistics and map of all self-attention layers.

    Attention is averaged over heads within a layer, then layers are averaged. No layer's
    ``[heads, N, N]`` matrix is ever whole: its rows are made, used and summed in chunks.

    Args:
        latents, sigma, text: as for :func:`lune_features`.
        spatial_size: side s of the map.
        query_chunk: rows per chunk; by default as many as fit a few tens of megabytes.
    """
    before = unet.attn_processors
    layers = [name for name in before if name.endswith("attn1.processor")]
    grids = _grids(latents.shape[-2], latents.shape[-1])
    stats: list[Tensor] = []
    maps: list[Tensor] = []

    def keep(layer_stats: Tensor, received: Tensor, tokens: int) -> None:
        stats.append(layer_stats)
        spatial = received.unflatten(-1, grids[tokens])[:, None]
        maps.append(F.interpolate(spatial, (spatial_size, spatial_size), mode="bilinear")[:, 0])
        if len(stats) == len(layers):
            raise _Stop

    watch = _WatchedAttention(keep, grids, query_chunk)
    unet.set_attn_processor({name: watch if name in layers else p for name, p in before.items()})
    try:
        _run(unet, latents, sigma, text)
    finally:
        unet.set_attn_processor(before)
    spatial = torch.stack(maps).mean(0)
    spatial = spatial / spatial.sum(dim=(1, 2), keepdim=True)
    return SolFeatures(torch.stack(stats).mean(0), spatial)


def _grids(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Token counts of a UNet's resolutions to their grids; a level halves, rounding up."""
    grids = {}
    while height * width not in grids:
        grids[height * width] = (height, width)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return grids


class _WatchedAttention:
    """A diffusers attention processor for self-attention that also takes its statistics."""

    def __init__(
        self,
        keep: Callable[[Tensor, Tensor, int], None],
        grids: dict[int, tuple[int, int]],
        query_chunk: int | None,
    ):
        self._keep, self._grids, self._chunk = keep, grids, query_chunk
        self._distances: dict[int, Tensor] = {}

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        batch, heads, tokens, _ = q.shape
        distance = self._distance(tokens, q.device)
        chunk = self._chunk or max(1, _CHUNK_BYTES // (4 * batch * heads * tokens))

        sums = torch.zeros(batch, 3, device=q.device)
        received = torch.zeros(batch, tokens, device=q.device)
        outputs = []
        for start in range(0, tokens, chunk):
            logits = q[:, :, start : start + chunk] @ k.transpose(-1, -2)
            rows = torch.softmax(logits.float() * attn.scale, dim=-1)
            outputs.append(rows.to(v.dtype) @ v)
            mean = rows.mean(1)  # [B, chunk, N], over heads
            received += mean.sum(1)
            far = torch.einsum("bqk,qk->b", mean, distance[start : start + chunk])
            entropy = torch.special.entr(mean).sum((1, 2))
            sums += torch.stack([far, entropy, mean.norm(dim=-1).reciprocal().sum(1)], dim=-1)

        far, entropy, ratio = (sums / tokens).unbind(-1)
        root = math.sqrt(tokens)
        # A single token attends to itself: perfectly local, and there is nothing to spread over.
        entropy = entropy / math.log(tokens) if tokens > 1 else torch.zeros_like(entropy)
        sparsity = (root - ratio) / (root - 1) if tokens > 1 else torch.ones_like(ratio)
        stats = torch.stack([1 - far, entropy, 1 - entropy, sparsity], dim=-1)
        self._keep(stats, received, tokens)

        merged = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](merged))

    def _distance(self, tokens: int, device: torch.device) -> Tensor:
        """``[N, N]`` distances on the layer's grid over the largest of them."""
        if tokens not in self._distances:
            height, width = self._grids[tokens]
            rows, columns = torch.meshgrid(
                torch.arange(height, device=device, dtype=torch.float32),
                torch.arange(width, device=device, dtype=torch.float32),
                indexing="ij",
            )
            places = torch.stack([rows, columns], dim=-1).flatten(0, 1)
            largest = max(math.hypot(height - 1, width - 1), 1.0)
            self._distances[tokens] = torch.cdist(places, places) / largest
        return self._distances[tokens]
