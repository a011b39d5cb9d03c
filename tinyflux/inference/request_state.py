"""What an engine knows of one request on its way."""

import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tinyflux.inference.guidance import TextCondition
from tinyflux.inference.request import RequestHandle, SampleRequest
from tinyflux.inference.solvers import Trajectory, evaluations_per_step
from tinyflux.model.model import TinyFluxDeep


@dataclass(eq=False)
class RequestState:
    """A request from its admission to its end.

    Attributes:
        model, version: what it is drawn with, and the number of that set of weights.
        path, cond, uncond: there once its prompts are encoded; ``uncond`` is None without
            guidance.
        evaluations: forwards that it wanted still when the last one was accounted for.
        denoised: no forward is wanted any more.
        previews: how many wait for the decoder.
    """

    request: SampleRequest
    model: TinyFluxDeep
    version: int
    handle: RequestHandle = dataclasses.field(init=False)
    path: Trajectory = dataclasses.field(init=False)
    cond: TextCondition = dataclasses.field(init=False)
    uncond: TextCondition | None = None
    evaluations: int = dataclasses.field(init=False)
    denoised: bool = False
    previews: int = 0

    def __post_init__(self) -> None:
        self.evaluations = self.request.num_steps * evaluations_per_step(self.request.solver)

    @property
    def batch_key(self) -> Hashable:
        """Requests whose keys are equal can share a forward.

        The number and not the model, which whoever remembers the key would keep in memory.
        """
        return self.request.height, self.request.width, self.version

    @property
    def guided(self) -> bool:
        """Whether its next forward takes a second row, of the negative prompt."""
        return self.uncond is not None

    def tensors(self) -> Iterator[Tensor]:
        """What a forward reads of it."""
        yield self.path.x
        for condition in (self.cond, self.uncond):
            if condition is not None:
                yield from (condition.t5, condition.pooled)
