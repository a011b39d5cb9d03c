"""Looking at a run while it goes on: held-out losses and pictures of fixed prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tinyflux.data.batches import HeldOut
from tinyflux.inference.sampler import Sampler
from tinyflux.model.model import TinyFluxDeep
from tinyflux.trainer.config import TrainerConfig
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.engine import autocast
from tinyflux.trainer.picture_figures import PictureFigures
from tinyflux.trainer.validation import validate
from tinyflux.util.picture_size import fitting_size


@dataclass(frozen=True)
class EvaluationRequest:
    """What to look at.

    Attributes:
        step: optimizer steps done.
        validate: whether to take held-out losses; draw: whether to draw the prompts.
        grid: ``(H, W)`` of the training data's latents, for pictures whose size is not configured.
        measure: whether to draw held-out captions and measure the pictures.
    """

    step: int
    validate: bool
    draw: bool
    grid: tuple[int, int]
    measure: bool = False

    def __bool__(self) -> bool:
        return self.validate or self.draw or self.measure


@dataclass(frozen=True)
class Evaluation:
    """What looking at the weights gave.

    Attributes:
        values: as of :func:`validate` and :meth:`PictureFigures.measure`, what was asked for.
        images: ``[B, 3, H, W]`` in [0, 1], one for each of the config's prompts; or None.
    """

    step: int
    values: dict[str, float] = field(default_factory=dict)
    images: Tensor | None = None


class Evaluations(Protocol):
    """Where a training loop has its weights looked at."""

    def submit(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        """Look at these whole tensors, the model's and the EMA's; they may change afterwards."""

    def take(self, wait: bool = False) -> list[Evaluation]:
        """The evaluations that are done since the last call, in order; with ``wait`` all."""


class Evaluator:
    """Looks at a model and its EMA.

    Args:
        held_out: samples to validate on, or None.
        sampler: draws ``config.sample_prompts`` with the EMA's weights, or None.
        figures: measures pictures that the EMA's weights draw, or None.
    """

    def __init__(
        self,
        model: TinyFluxDeep,
        ema: EMA,
        config: TrainerConfig,
        t_buckets: Tensor,
        held_out: HeldOut | None,
        sampler: Sampler | None,
        figures: PictureFigures | None = None,
    ):
        self.model, self.ema, self.config = model, ema, config
        self._device = next(model.parameters()).device
        self._t_buckets = t_buckets.to(self._device)
        self._held_out, self._sampler, self._figures = held_out, sampler, figures
        # A size that cannot be drawn is told now, and not when the first pictures are due.
        self._sides = _sample_sides(config, sampler)

    def look(self, request: EvaluationRequest) -> Evaluation:
        """Neither the weights nor any random state are changed."""
        values: dict[str, float] = {}
        if request.validate and self._held_out is not None and self._held_out.batches:
            with autocast(self._device, self.config.dtype):
                values = validate(
                    self.model, self._held_out, self.config, self._t_buckets, self.ema
                )
        if request.measure and self._figures is not None:
            values |= self._figures.measure()
        return Evaluation(request.step, values, self._draw(request.grid) if request.draw else None)

    def _draw(self, grid: tuple[int, int]) -> Tensor | None:
        config = self.config
        if self._sampler is None or not config.sample_prompts:
            return None
        return self._sampler.generate(
            config.sample_prompts,
            num_steps=config.sample_steps,
            guidance_scale=config.sample_guidance,
            height=self._sides[0] or grid[0],
            width=self._sides[1] or grid[1],
            seed=config.sample_seed,
            negative_prompt="",
        )


def _sample_sides(config: TrainerConfig, sampler: Sampler | None) -> tuple[int | None, int | None]:
    """Height and width of sample grids' pictures in latents; None is that of the training data."""
    if sampler is None or not config.sample_prompts or config.sample_size is None:
        return config.sample_height, config.sample_width
    step = sampler.zoo.downscale
    width, height = fitting_size(config.sample_size, "trainer.sample_size", step)
    return height // step, width // step


class InlineEvaluator:
    """Evaluations in the training process, on its own model and EMA, while training waits."""

    def __init__(self, evaluator: Evaluator):
        self._evaluator = evaluator
        self._done: list[Evaluation] = []

    def submit(
        self,
        request: EvaluationRequest,
        weights: Mapping[str, Tensor],
        shadow: Mapping[str, Tensor],
    ) -> None:
        self._done.append(self._evaluator.look(request))

    def take(self, wait: bool = False) -> list[Evaluation]:
        done, self._done = self._done, []
        return done
