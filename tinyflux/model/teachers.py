"""What the student learns from its two teachers, frozen SD1.5-class UNets.

Lune gives the mean of its mid block; Sol gives statistics of its self-attention and a map of where
attention goes. Both run in their own time convention: ``sigma = 1`` is noise and the UNet is told
``1000 * sigma``. The teacher for student time t runs at ``sigma = 1 - t``, on the same
``(1 - t) * noise + t * data``.

Shape legend: B batch, C latent channels, h x w latent grid, N tokens of an attention layer.
"""

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyflux.model.attention_stats import watched_attention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SPATIAL_SIZE = 8


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


def _run(unet: "UNet2DConditionModel", latents: Tensor, sigma: Tensor, text: Tensor) -> None:
    """The UNet's forward, until a hook stops it."""
    dtype = next(unet.parameters()).dtype
    with suppress(_Stop):
        unet(latents.to(dtype), (1000 * sigma).float(), text.to(dtype), return_dict=False)


@torch.no_grad()
def lune_features(
    unet: "UNet2DConditionModel", latents: Tensor, sigma: Tensor, text: Tensor
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
    unet: "UNet2DConditionModel",
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
        query_chunk: rows at a time, by default as many as suit the device.
    """
    before = unet.attn_processors
    layers = [name for name in before if name.endswith("attn1.processor")]
    watch = _SolProcessor(len(layers), _grids(latents.shape[-2], latents.shape[-1]), query_chunk)
    unet.set_attn_processor({name: watch if name in layers else p for name, p in before.items()})
    try:
        _run(unet, latents, sigma, text)
    finally:
        unet.set_attn_processor(before)
    size = (spatial_size, spatial_size)
    maps = [F.interpolate(grid[:, None], size, mode="bilinear")[:, 0] for grid in watch.received]
    spatial = torch.stack(maps).mean(0)
    spatial = spatial / spatial.sum(dim=(1, 2), keepdim=True)
    return SolFeatures(torch.stack(watch.stats).mean(0), spatial)


def _grids(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Token counts of a UNet's resolutions to their grids; a level halves, rounding up."""
    grids = {}
    while height * width not in grids:
        grids[height * width] = (height, width)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return grids


class _SolProcessor:
    """A diffusers attention processor for all self-attention layers, that keeps what it saw.

    Attributes:
        stats: ``[B, 4]`` of each layer.
        received: ``[B, h, w]`` of each layer, attention that each place of its grid got.
    """

    def __init__(self, layers: int, grids: dict[int, tuple[int, int]], query_chunk: int | None):
        self._layers, self._grids, self._query_chunk = layers, grids, query_chunk
        self.stats: list[Tensor] = []
        self.received: list[Tensor] = []

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def heads(projection: torch.nn.Module) -> Tensor:
            # Contiguous, or every product would pack heads that lie side by side anew.
            split = projection(hidden_states).unflatten(-1, (attn.heads, -1))
            per_head: Tensor = split.transpose(1, 2).contiguous()
            return per_head

        # Nobody reads what the last layer puts out.
        is_last = len(self.stats) + 1 == self._layers
        v = None if is_last else heads(attn.to_v)
        q, k = heads(attn.to_q), heads(attn.to_k)
        grid = self._grids[q.shape[2]]
        seen = watched_attention(q, k, v, attn.scale, grid, self._query_chunk)
        self.stats.append(seen.stats)
        self.received.append(seen.received.unflatten(-1, grid))
        if seen.output is None:
            raise _Stop
        out: Tensor = attn.to_out[1](attn.to_out[0](seen.output.transpose(1, 2).flatten(2)))
        return out
