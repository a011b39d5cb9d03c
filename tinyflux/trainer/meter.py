"""The figures of the steps between two log lines."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LOSSES = 4  # total, velocity, Lune and Sol; those of trainer.align follow


@dataclass(frozen=True)
class StepFigures:
    """Means over the steps since the last log line, over all workers.

    Attributes:
        loss: what was minimised; ``loss_main``, ``loss_lune`` and ``loss_sol`` its parts,
            unweighted, as ``aligned``, those of ``trainer.align`` by name; NaN if every step was
            skipped.
        lr: the last step's learning rate; ``grad_norm``: its gradient's norm before clipping.
        samples_per_s: of all workers; ``data_wait``: the share of time that was waited for data.
        skipped_steps: of the run so far, for gradients that were not finite.
        seconds_per_step: the wait for its data included.
    """

    loss: float
    loss_main: float
    loss_lune: float
    loss_sol: float
    lr: float
    grad_norm: float
    samples_per_s: float
    data_wait: float
    skipped_steps: int
    seconds_per_step: float
    aligned: dict[str, float] = field(default_factory=dict)


class StepMeter:
    """Adds up losses on the device, which nobody waits for, and times.

    The clock runs from :meth:`wait_for_data` over :meth:`data_is_there` to :meth:`step_is_done`.

    Args:
        aligned: names of the losses that follow the velocity's, Lune's and Sol's.
    """

    def __init__(self, device: torch.device, aligned: Sequence[str] = ()):
        self._aligned = list(aligned)
        # Losses, and of how many steps.
        self._sums = torch.zeros(LOSSES + len(aligned) + 1, device=device)
        self._begun = self._ready = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew, after a log line."""
        self._sums.zero_()
        self._steps = self._samples = 0
        self._wait = self._busy = 0.0

    def wait_for_data(self) -> None:
        """Start the clock of a step."""
        self._begun = time.perf_counter()

    def data_is_there(self) -> None:
        """Note that what follows is work."""
        self._ready = time.perf_counter()

    def step_is_done(self, samples: int) -> None:
        """Stop the clock of a step of so many ``samples`` over all workers."""
        self._wait += self._ready - self._begun
        self._busy += time.perf_counter() - self._begun
        self._steps += 1
        self._samples += samples

    def no_losses(self) -> Tensor:
        """Zeros, to add those of a step's micro-batches to."""
        return torch.zeros_like(self._sums[:-1])

    def add_losses(self, losses: Tensor, taken: Tensor) -> None:
        """Count a step's losses, those of :meth:`no_losses`, unless it was not ``taken``.

        Args:
            taken: a bool scalar.
        """
        counted = torch.where(taken, losses, 0.0)
        self._sums += torch.cat([counted, taken.reshape(1).float()])

    @property
    def sums(self) -> Tensor:
        """``[5 + A]``: this worker's sums of the losses, and of how many steps."""
        return self._sums

    def figures(self, sums: Tensor, norm: Tensor, lr: float, skipped: int) -> StepFigures:
        """The figures since the last :meth:`reset`; the one place that waits for the device.

        Args:
            sums: :attr:`sums`, averaged over the workers.
            norm: the last gradient's, a scalar.
        """
        means = sums[:-1] / sums[-1]
        values = torch.cat([means, norm.reshape(1).to(sums)]).tolist()
        loss, loss_main, loss_lune, loss_sol, *aligned, grad_norm = values
        busy = max(self._busy, 1e-9)
        return StepFigures(
            loss=loss,
            loss_main=loss_main,
            loss_lune=loss_lune,
            loss_sol=loss_sol,
            lr=lr,
            grad_norm=grad_norm,
            samples_per_s=self._samples / busy,
            data_wait=self._wait / busy,
            skipped_steps=skipped,
            seconds_per_step=self._busy / max(1, self._steps),
            aligned=dict(zip(self._aligned, aligned, strict=True)),
        )
