"""What is due after an optimizer step."""

from dataclasses import dataclass

from tinyflux.trainer.config import TrainerConfig


@dataclass(frozen=True)
class Due:
    """What is due when a step is done: the same on every worker, for all of them take part in it.

    Attributes:
        report: whether the losses are logged.
        step_checkpoint, epoch_checkpoint: whether one of that kind is written, and
            step_upload, epoch_upload: whether it is uploaded, too.
        validate: whether held-out losses are taken; draw: whether the prompts are drawn;
            measure: whether pictures are drawn and measured against held-out ones.
    """

    report: bool = False
    step_checkpoint: bool = False
    step_upload: bool = False
    epoch_checkpoint: bool = False
    epoch_upload: bool = False
    validate: bool = False
    draw: bool = False
    measure: bool = False

    @classmethod
    def after(cls, config: TrainerConfig, step: int, finished_epoch: int | None) -> "Due":
        """What is due after ``step`` steps.

        Args:
            finished_epoch: complete passes over the data, if the step has completed one.
        """
        last = step >= config.total_steps
        epoch = finished_epoch or 0
        step_upload = every(config.upload_every_steps, step)
        epoch_upload = every(config.upload_every_epochs, epoch)
        return cls(
            report=last or every(config.log_every, step),
            step_checkpoint=last or every(config.save_every_steps, step) or step_upload,
            step_upload=step_upload,
            epoch_checkpoint=every(config.save_every_epochs, epoch) or epoch_upload,
            epoch_upload=epoch_upload,
            validate=config.validate_every is not None
            and (last or every(config.validate_every, step)),
            draw=every(config.sample_every, step),
            measure=config.evaluate_every is not None
            and (last or every(config.evaluate_every, step)),
        )

    @classmethod
    def before_first(cls, config: TrainerConfig, step: int) -> "Due":
        """What an uninterrupted run has recorded of the weights that a run starts from.

        Of the first weights of all, that is their held-out losses.
        """
        validate = config.validate_every is not None and step % config.validate_every == 0
        return cls(
            validate=validate,
            draw=every(config.sample_every, step),
            measure=every(config.evaluate_every, step),
        )


def every(period: int | None, count: int) -> bool:
    """Whether ``count`` is one of ``period``, ``2 * period`` and so on; never, if that is None."""
    return period is not None and count > 0 and count % period == 0
