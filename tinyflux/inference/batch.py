"""The samples of a batch, and one forward of it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.request import RequestHandle, SampleRequest
from tinyflux.inference.solvers import Trajectory
from tinyflux.inference.streams import on_device
from tinyflux.model.model import TinyFluxDeep


@dataclass(eq=False)
class Sample:
    """A request on its way.

    Attributes:
        model, weights: what it is drawn with, and that set of weights' number.
        denoised: no forward is wanted any more.
        previews: how many wait for the decoder.
        path, cond, uncond: there once its prompts are encoded; ``uncond`` is None without
            guidance.
    """

    request: SampleRequest
    model: TinyFluxDeep
    weights: int
    handle: RequestHandle = dataclasses.field(init=False)
    path: Trajectory = dataclasses.field(init=False)
    cond: TextCondition = dataclasses.field(init=False)
    uncond: TextCondition | None = None
    evaluations: int = 0
    denoised: bool = False
    previews: int = 0

    def tensors(self) -> Iterator[Tensor]:
        """What a forward reads of it."""
        yield self.path.x
        for condition in (self.cond, self.uncond):
            if condition is not None:
                yield from (condition.t5, condition.pooled)


def advance(batch: list[Sample]) -> list[Sample]:
    """One forward for samples of one model and size; those that ended a step by it."""
    # Those with guidance stand in front: only they need a second row.
    guided = [sample for sample in batch if sample.uncond is not None]
    batch = guided + [sample for sample in batch if sample.uncond is None]
    negative = [sample.uncond for sample in guided if sample.uncond is not None]
    x = torch.stack([sample.path.x for sample in batch])
    v = guided_velocity(
        batch[0].model,
        x,
        on_device([sample.path.t for sample in batch], x.device),
        _together([sample.cond for sample in batch]),
        _together(negative) if negative else None,
        on_device([sample.request.guidance_scale for sample in guided], x.device),
        batch[0].model.config.patch_size,
    )
    return [sample for sample, each in zip(batch, v, strict=True) if sample.path.advance(each)]


def _together(conditions: list[TextCondition]) -> TextCondition:
    """Conditions ``[1, ...]`` as one ``[B, ...]``."""
    t5 = torch.cat([each.t5 for each in conditions])
    return TextCondition(t5, torch.cat([each.pooled for each in conditions]))
