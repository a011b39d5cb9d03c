"""What a training run's settings may be, each by itself and beside the others."""

from typing import TYPE_CHECKING

import torch

from tinyflux.errors import ConfigError
from tinyflux.trainer.align_config import check_targets
from tinyflux.trainer.direction import MEASURED, check_metric
from tinyflux.util.config import nearest

if TYPE_CHECKING:
    from tinyflux.trainer.config import TrainerConfig

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "muon")
LR_SCHEDULERS = ("cosine", "linear", "constant", "wsd")
WARMUP_TYPES = ("linear", "cosine")
LUNE_MODES = ("cosine", "mse", "huber")
SNR_KINDS = ("epsilon", "velocity")
NOISE_GENERATORS = ("torch", "philox")
TRACKERS = ("tensorboard", "wandb", "mlflow")
# The relative width of a plain mean: a power function's EMA is shorter.
LONGEST_EMA = 12**-0.5
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Settings by what their values must be.
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "optimizer": OPTIMIZERS,
    "lr_scheduler": LR_SCHEDULERS,
    "warmup_type": WARMUP_TYPES,
    "lune_mode": LUNE_MODES,
    "snr_kind": SNR_KINDS,
    "noise_generator": NOISE_GENERATORS,
    "compile_mode": (None, *COMPILE_MODES),
}
_COUNTS = (
    "gradient_accumulation", "total_steps", "log_every", "batch_size", "keep_last_n_steps",
    "keep_last_n_epochs", "evaluate_pictures",
)  # fmt: skip
_OPTIONAL_COUNTS = ("sample_steps", "max_nonfinite_steps", "shift_tokens", "start_at_rows")
_PERIODS = (
    "save_every_steps", "save_every_epochs", "sample_every", "validate_every",
    "upload_every_steps", "upload_every_epochs", "evaluate_every",
)  # fmt: skip
_SHARES = ("lune_dropout", "sol_dropout", "text_dropout", "lr_decay_ratio")
_SHARES_BELOW_ONE = ("ema_decay", "val_fraction")
_POSITIVE = ("learning_rate", "shift", "snr_gamma", "huber_delta")
_NOT_NEGATIVE = ("weight_decay", "grad_clip", "warmup_steps", "min_lr", "logit_std")


def check_trainer(config: "TrainerConfig") -> None:
    """Refuse a setting that cannot work.

    Raises:
        ConfigError: its name, its value, and what it may be.
    """
    _check_choices(config)
    _check_counts(config)
    _check_numbers(config)
    _check_best(config)
    _check_adapter(config)
    check_targets(config.align)
    _check_uploads(config)
    _check_growth(config)


def _check_choices(config: "TrainerConfig") -> None:
    """Refuse words that mean nothing."""
    for name, valid in _CHOICES.items():
        value = getattr(config, name)
        if value not in valid:
            words = [word for word in valid if word is not None]
            raise ConfigError(
                f"trainer.{name} '{value}' is unknown{nearest(str(value), words)}: "
                f"choose one of {', '.join(words)}"
            )
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            raise ConfigError(
                f"trainer.trackers has '{tracker}', which is unknown"
                f"{nearest(tracker, TRACKERS)}: choose from {', '.join(TRACKERS)}"
            )
    _require(
        config,
        "dtype",
        config.dtype in (torch.float32, torch.bfloat16),
        "float32 or bfloat16 (float16 gradients overflow)",
    )


def _check_counts(config: "TrainerConfig") -> None:
    """Refuse numbers of things that are none."""
    for name in _COUNTS:
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in _OPTIONAL_COUNTS:
        value = getattr(config, name)
        _require(config, name, value is None or value >= 1, "1 or more")
    for name in _PERIODS:
        value = getattr(config, name)
        _require(config, name, value is None or value >= 1, "at least 1, or null for never")


def _check_numbers(config: "TrainerConfig") -> None:
    """Refuse numbers outside of what they mean."""
    for name in _SHARES:
        _require(config, name, 0 <= getattr(config, name) <= 1, "between 0 and 1")
    for name in _SHARES_BELOW_ONE:
        _require(config, name, 0 <= getattr(config, name) < 1, "at least 0 and below 1")
    for name in _POSITIVE:
        _require(config, name, getattr(config, name) > 0, "above 0")
    for name in _NOT_NEGATIVE:
        _require(config, name, getattr(config, name) >= 0, "0 or more")
    _require(
        config,
        "ema_lengths",
        all(0 < length < LONGEST_EMA for length in config.ema_lengths)
        and len(set(config.ema_lengths)) == len(config.ema_lengths),
        f"different numbers above 0 and below {LONGEST_EMA:.4f}",
    )
    _require(config, "betas", all(0 <= beta < 1 for beta in config.betas), "between 0 and 1")


def _check_best(config: "TrainerConfig") -> None:
    """Refuse a best checkpoint that could never be found."""
    if config.best_metric is None:
        return
    try:
        check_metric(config.best_metric)
    except ConfigError as error:
        raise ConfigError(f"trainer.best_metric: {error}") from error
    name = "evaluate_every" if config.best_metric.startswith(MEASURED) else "validate_every"
    every, saved = getattr(config, name), config.save_every_steps
    if every is None or not config.val_fraction:
        raise ConfigError(
            f"trainer.best_metric '{config.best_metric}' needs trainer.{name} and a "
            "trainer.val_fraction above 0"
        )
    if saved is None or every % saved:
        raise ConfigError(
            f"trainer.best_metric '{config.best_metric}' is known every {every} steps "
            f"(trainer.{name}), which must be a multiple of trainer.save_every_steps, "
            f"not of {saved}: a step without a checkpoint cannot be the best one"
        )


def _check_adapter(config: "TrainerConfig") -> None:
    """Refuse an adapter of nothing, and an optimizer that is not for its matrices."""
    if config.adapter is None:
        return
    if config.init_from is None:
        raise ConfigError(
            "trainer.adapter needs trainer.init_from, the weights that it is trained on"
        )
    if config.optimizer == "muon":
        raise ConfigError(
            "trainer.optimizer 'muon' is for the blocks' own matrices, which trainer.adapter "
            "leaves as they are: use 'adamw'"
        )
    if config.ema_lengths:
        raise ConfigError(
            "trainer.ema_lengths keeps averages of whole models, and trainer.adapter trains a "
            "part of one: leave one of them out"
        )
    if config.align:
        raise ConfigError(
            "trainer.align trains projectors beside a whole student, and trainer.adapter a part of "
            "one: leave one of them out"
        )


def _check_uploads(config: "TrainerConfig") -> None:
    """Refuse uploads to nowhere."""
    if config.hf_repo_id is None and (config.upload_every_steps or config.upload_every_epochs):
        raise ConfigError("trainer.upload_every_* needs trainer.hf_repo_id, where to upload to")


def _check_growth(config: "TrainerConfig") -> None:
    """Refuse figures of held-out rows that are not known yet."""
    if config.start_at_rows is not None and config.evaluate_every is not None:
        raise ConfigError(
            "trainer.evaluate_every measures by rows of a finished cache, and "
            "trainer.start_at_rows begins without one: leave one of them out "
            "(trainer.validate_every goes with both)"
        )


def _require(config: "TrainerConfig", name: str, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"trainer.{name} must be {what}, not {getattr(config, name)!r}")
