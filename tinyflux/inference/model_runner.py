"""One forward of the model for all requests of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.inference.adapters import drawn_with
from tinyflux.inference.guidance import TextCondition, guided_velocity
from tinyflux.inference.request_state import RequestState
from tinyflux.inference.streams import on_device


@dataclass(frozen=True)
class ModelInputs:
    """What a forward of B requests reads, of which the first G are guided.

    Attributes:
        x: ``[B, C, H, W]`` latents.
        t: ``[B]``, each request's own time.
        cond: of all; ``uncond``: of the guided ones, None if there are none.
        guidance: ``[G]``.
        adapters: names for the B rows with a caption, then for the G without; None is the student.
    """

    x: Tensor
    t: Tensor
    cond: TextCondition
    uncond: TextCondition | None
    guidance: Tensor
    adapters: list[str | None]


def execute_model(batch: Sequence[RequestState]) -> list[RequestState]:
    """Advance requests of one model and size by one forward; those that ended a step by it."""
    # The guided ones stand in front: only they take a second row.
    batch = sorted(batch, key=lambda state: not state.guided)
    model, inputs = batch[0].model, prepare_inputs(batch)
    with drawn_with(model, inputs.adapters):
        v = guided_velocity(
            model,
            inputs.x,
            inputs.t,
            inputs.cond,
            inputs.uncond,
            inputs.guidance,
            model.config.patch_size,
        )
    return [state for state, each in zip(batch, v, strict=True) if state.path.advance(each)]


def prepare_inputs(batch: Sequence[RequestState]) -> ModelInputs:
    """The inputs of a forward of ``batch``, whose guided requests stand in front."""
    x = torch.stack([state.path.x for state in batch])
    guided = [state for state in batch if state.guided]
    negative = [state.uncond for state in guided if state.uncond is not None]
    return ModelInputs(
        x,
        on_device([state.path.t for state in batch], x.device),
        _together([state.cond for state in batch]),
        _together(negative) if negative else None,
        on_device([state.request.guidance_scale for state in guided], x.device),
        [state.request.adapter for state in [*batch, *guided]],
    )


def _together(conditions: list[TextCondition]) -> TextCondition:
    """Conditions ``[1, ...]`` as one ``[B, ...]``."""
    t5 = torch.cat([each.t5 for each in conditions])
    return TextCondition(t5, torch.cat([each.pooled for each in conditions]))
