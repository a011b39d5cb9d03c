"""Softmax attention that is looked at while it is computed.

The statistics need rows of attention, averaged over heads. Rows are made, averaged and summed a
chunk of queries at a time: no ``[H, N, N]`` matrix exists, and on a CPU a chunk is still in the
cache when the next operation reads it.

Shape legend: B samples, H heads, N tokens on an h x w grid, D width of a head; b samples and n
queries in one chunk.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of one chunk's fp32 rows, of all heads. A CPU wants them to stay in its cache; a GPU wants
# few launches, each of which fills it.
_CPU_CHUNK, _GPU_CHUNK = 2**24, 2**28
_TINY = torch.finfo(torch.float32).tiny


class Watched(NamedTuple):
    """Attention and what was seen of it.

    Attributes:
        output: ``[B, H, N, D]`` in the dtype of the values; None when there were none.
        stats: ``[B, 4]`` fp32: locality, entropy, clustering, sparsity, each in [0, 1].
        received: ``[B, N]`` fp32, attention each key gets from all queries, averaged over heads.
    """

    output: Tensor | None
    stats: Tensor
    received: Tensor


def watched_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    grid: tuple[int, int],
    query_chunk: int | None = None,
) -> Watched:
    """``softmax(scale * q k^T) v``, and statistics of the rows of that softmax.

    Args:
        q, k, v: ``[B, H, N, D]``, contiguous; without ``v`` there are statistics alone.
        grid: h and w; the ``h * w = N`` tokens lie on it row by row.
        query_chunk: queries at a time, by default as many as suit the device. Where that is more
            than N, a chunk is as many whole samples as it can hold.
    """
    batch, _, tokens, _ = q.shape
    windows = _distance_windows(*grid, q.device)
    window = torch.arange(tokens - 1, -1, -1, device=q.device)
    row, column = window // grid[1], window % grid[1]
    sums = torch.zeros(batch, 3, device=q.device)
    received = torch.zeros(batch, tokens, device=q.device)
    # The rows are at hand, and a CPU multiplies them by v in half the time of a fused attention.
    # To a GPU that is next to nothing, and reading fp32 rows once more is not.
    by_rows = v is not None and not q.is_cuda
    output = torch.empty_like(q) if by_rows else None

    for samples, queries, rows in _chunks(q, k, scale, query_chunk):
        if output is not None and v is not None:
            output[samples, :, queries] = rows.to(v.dtype) @ v[samples]
        mean = rows.mean(1)
        received[samples] += mean.sum(1)
        sums[samples] += _sums(mean, windows[row[queries], column[queries]].flatten())

    if v is not None and output is None:
        output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return Watched(output, _statistics(sums / tokens, tokens), received)


def _chunks(
    q: Tensor, k: Tensor, scale: float, query_chunk: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Samples, queries and their rows of attention, ``[b, H, n, N]`` fp32, until all were made.

    The rows of one chunk are overwritten by the next: on a CPU fresh pages cost more than the
    arithmetic done in them.
    """
    batch, heads, tokens, _ = q.shape
    limit = _GPU_CHUNK if q.is_cuda else _CPU_CHUNK
    size = query_chunk or max(1, limit // (4 * heads * tokens))
    many, size = min(batch, max(1, size // tokens)), min(size, tokens)
    buffer = torch.empty(many * heads, size, tokens, device=q.device)
    logits = buffer if q.dtype == buffer.dtype else torch.empty_like(buffer, dtype=q.dtype)
    for first in range(0, batch, many):
        samples = slice(first, min(first + many, batch))
        queries_of, keys_of = q[samples].flatten(0, 1), k[samples].flatten(0, 1).mT
        for start in range(0, tokens, size):
            queries = slice(start, min(start + size, tokens))
            part = (slice(len(keys_of)), slice(queries.stop - start))
            # alpha scales inside the product, before half precision rounds.
            torch.baddbmm(
                logits[part], queries_of[:, queries], keys_of, beta=0, alpha=scale, out=logits[part]
            )
            torch.softmax(logits[part], dim=-1, dtype=buffer.dtype, out=buffer[part])
            yield samples, queries, buffer[part].unflatten(0, (-1, heads))


def _sums(mean: Tensor, distances: Tensor) -> Tensor:
    """Sums over queries ``[b, 3]``: expected distance, entropy, ``|a|_1 / |a|_2``.

    Args:
        mean: ``[b, n, N]`` rows, averaged over heads, each summing to 1.
        distances: ``[n * N]`` from each of the queries to each key.
    """
    flat = mean.flatten(1)
    logs = flat.clamp_min(_TINY).log_()
    entropy = -torch.bmm(flat[:, None], logs[:, :, None]).flatten()
    ratio = torch.linalg.vector_norm(mean, dim=-1).reciprocal().sum(1)
    return torch.stack([flat @ distances, entropy, ratio], dim=-1)


def _statistics(means: Tensor, tokens: int) -> Tensor:
    """``[B, 4]`` of the means over queries ``[B, 3]`` of what :func:`_sums` sums."""
    distance, entropy, ratio = means.unbind(-1)
    root = math.sqrt(tokens)
    # A single token attends to itself: perfectly local, and there is nothing to spread over.
    entropy = entropy / math.log(tokens) if tokens > 1 else torch.zeros_like(entropy)
    sparsity = (root - ratio) / (root - 1) if tokens > 1 else torch.ones_like(ratio)
    return torch.stack([1 - distance, entropy, 1 - entropy, sparsity], dim=-1)


def _distance_windows(height: int, width: int, device: torch.device) -> Tensor:
    """Distances over the largest on the grid, ``[h, w, h, w]``: a view of ``[2h - 1, 2w - 1]``.

    A distance depends on the offset alone. The window at ``(h - 1 - y, w - 1 - x)`` of the table of
    all offsets holds the distances from the place ``(y, x)`` to every other.
    """
    rows = torch.arange(1 - height, height, device=device, dtype=torch.float32)
    columns = torch.arange(1 - width, width, device=device, dtype=torch.float32)
    largest = max(math.hypot(height - 1, width - 1), 1.0)
    table = torch.hypot(rows[:, None], columns) / largest
    return table.unfold(0, height, 1).unfold(1, width, 1)
