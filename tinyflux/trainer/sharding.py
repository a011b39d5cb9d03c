"""Tensors cut over the workers of a run: each keeps one part of every flattened tensor.

Rank ``r`` of ``n`` keeps elements ``[r * s, (r + 1) * s)`` with ``s = ceil(numel / n)``, so the
last parts may be shorter or empty. DeepSpeed's ZeRO-3 cuts parameters in the same way.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This worker's rank and the number of workers; ``(0, 1)`` without a process group."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def part(tensor: Tensor, rank: int, world: int) -> Tensor:
    """The part of ``tensor`` that ``rank`` keeps: 1-D, sharing its memory if it is contiguous."""
    size = -(-tensor.numel() // world)
    return tensor.detach().reshape(-1)[rank * size : (rank + 1) * size]


def part_size(shape: torch.Size, rank: int, world: int) -> int:
    """How many elements of a tensor of ``shape`` ``rank`` keeps."""
    count = shape.numel()
    size = -(-count // world)
    return max(0, min(count, (rank + 1) * size) - rank * size)


def parts_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """This worker's parts of the whole tensors ``names``."""
    rank, world = rank_and_world()
    return {name: part(tensors[name], rank, world) for name in names}


def gather(
    parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor] | None:
    """Whole tensors of ``shapes`` on the CPU of rank 0, None elsewhere; called by all workers."""
    rank, world = rank_and_world()
    whole: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        padded = padded_part(parts[name], shape, world)
        pieces = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
        if world > 1:
            dist.gather(padded, pieces)
        else:
            pieces = [padded]
        if pieces is not None:
            whole[name] = torch.cat(pieces)[: shape.numel()].view(shape).cpu()
    return whole if rank == 0 else None


def padded_part(piece: Tensor, shape: torch.Size, world: int) -> Tensor:
    """A part of a tensor of ``shape`` with zeros behind it, as long as the other workers'."""
    size = -(-shape.numel() // world)
    padded = piece.new_zeros(size)
    padded[: piece.numel()] = piece
    return padded
