"""Dropout whose masks depend on the sample, not on its batch, rank or device."""

import torch
from torch import Tensor, nn

_STRIDE = 0x2545F491  # between the elements of two layers, as the hash takes them


class SampleDropout(nn.Module):
    """Dropout by a hash of (the sample's seed, the element), a drop-in for ``nn.Dropout``.

    Pure tensor operations, so that it compiles and is the same on every device.

    Args:
        place: of the layer among the model's dropouts, so that each drops other elements.
    """

    def __init__(self, p: float, place: int = 0):
        super().__init__()
        self.p, self.place = p, place
        self.seeds: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[B, ...]``; one seed per sample must be set while training."""
        if not self.training or self.p == 0 or self.seeds is None:
            return x
        elements = torch.arange(x[0].numel(), device=x.device) + self.place * _STRIDE
        keep = _uniform(self.seeds[:, None] + elements) >= self.p
        return x * keep.reshape(x.shape).to(x.dtype) / (1 - self.p)


def install(model: nn.Module) -> list[SampleDropout]:
    """Swap every ``nn.Dropout`` of ``model`` for :class:`SampleDropout`; all of its dropouts."""
    place = sum(isinstance(module, SampleDropout) for module in model.modules())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, SampleDropout(child.p, place))
                place += 1
    return [module for module in model.modules() if isinstance(module, SampleDropout)]


def _uniform(x: Tensor) -> Tensor:
    """int64 to fp32 in [0, 1) by a multiply-xorshift hash on 31 bits, which cannot overflow."""
    mask = 0x7FFFFFFF
    x = x & mask
    for factor in (0x2C1B3C6D, 0x297A2D39):
        x = ((x ^ (x >> 15)) * factor) & mask
    x = x ^ (x >> 15)
    return (x >> 7).to(torch.float32) / (1 << 24)
