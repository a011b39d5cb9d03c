"""What a training run can be told."""

from dataclasses import dataclass, field

import torch

from tinyflux.errors import ConfigError
from tinyflux.trainer.losses import LUNE_MODES, SNR_KINDS
from tinyflux.trainer.schedules import constant_with_warmup, cosine_schedule, linear_decay
from tinyflux.trainer.trackers import PACKAGES
from tinyflux.util.config import nearest

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
LR_SCHEDULERS = ("cosine", "linear", "constant")
WARMUP_TYPES = ("linear", "cosine")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class TrainerConfig:
    """Settings of a training run.

    Raises:
        ConfigError: a value that cannot work.
    """

    # Optimization
    learning_rate: float = 1e-4
    optimizer: str = "adamw"  # "adamw", "adamw_8bit" (needs bitsandbytes), "adafactor"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0  # largest gradient norm; 0 clips nothing
    gradient_accumulation: int = 4  # micro-batches per optimizer step

    # Schedule
    total_steps: int = 100000  # optimizer steps
    warmup_steps: int = 1000
    lr_scheduler: str = "cosine"  # "cosine", "linear", "constant"
    min_lr: float = 0.0  # where cosine and linear end
    warmup_type: str = "linear"  # "linear", "cosine"

    # Memory optimization
    gradient_checkpointing: bool = False
    compile_mode: str | None = None  # "default", "reduce-overhead", "max-autotune"

    # Flow matching
    # Time shift, of times that are 1 at the data: above 1 trains less near noise, below 1 more.
    # FLUX and SD3 shift the noise level instead; their 3 is 1/3 here.
    shift: float = 3.0
    logit_normal_sampling: bool = True  # else uniform
    logit_mean: float = 0.0
    logit_std: float = 1.0

    # Loss
    use_snr_weighting: bool = True  # see snr_kind
    snr_gamma: float = 5.0
    # With a delta under the residuals, which are near 1, a median is learned; a flow needs a mean.
    use_huber_loss: bool = True
    huber_delta: float = 0.1
    use_spatial_weighting: bool = False  # weigh tokens by the Sol teacher's map

    # Expert distillation
    enable_lune: bool = True
    lune_weight: float = 0.1
    lune_warmup_steps: int = 1000
    # Share of samples whose forward does not see Lune, as in use. Lune and Sol drop by one draw, so
    # equal shares drop both together, and a dropped caption drops both.
    lune_dropout: float = 0.1
    lune_mode: str = "cosine"  # "cosine", "mse", "huber"

    enable_sol: bool = True
    sol_weight: float = 0.05
    sol_warmup_steps: int = 2000
    sol_dropout: float = 0.1  # as lune_dropout, of Sol

    # Text
    text_dropout: float = 0.1  # share of samples trained on the null caption, for guidance

    # EMA
    ema_decay: float = 0.9999

    # Checkpointing
    checkpoint_dir: str = "./checkpoints"
    save_every_steps: int | None = 1000
    save_every_epochs: int | None = None
    keep_last_n_steps: int = 5
    keep_last_n_epochs: int = 3

    # Logging
    log_every: int = 100
    tensorboard_dir: str = "./logs"

    # Sampling
    sample_every: int | None = 1000
    sample_prompts: list[str] = field(default_factory=list)
    sample_dir: str = "./samples"

    # HuggingFace upload
    hf_repo_id: str | None = None
    upload_every_steps: int | None = None
    upload_every_epochs: int | None = None

    # Precision: fp32 weights under autocast to this
    dtype: torch.dtype = torch.bfloat16

    # Beyond the published API
    batch_size: int = 64  # samples per optimizer step over all workers, for runs from a cache
    seed: int = 0
    val_fraction: float = 0.05  # held-out share of a cache
    validate_every: int | None = None  # optimizer steps
    sample_steps: int = 28
    sample_guidance: float = 5.0
    sample_seed: int = 0
    sample_height: int | None = None  # latent rows; None: those of the training data
    sample_width: int | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # also "wandb", "mlflow"
    tracker_project: str = "tinyflux"
    ema_warmup: bool = True  # let the EMA's decay rise to ema_decay; see ema_decay_at
    # Latents of a picture (height x width) at which `shift` holds; larger pictures get more noise,
    # smaller ones less. None: it holds for all.
    shift_tokens: int | None = None
    # Whose min-SNR weight: "epsilon" prefers noisy times, "velocity" is that of what is predicted.
    snr_kind: str = "epsilon"
    async_checkpoints: bool = True  # write them in a thread, from a copy in CPU memory
    max_nonfinite_steps: int = 10  # consecutive skipped steps that end the run

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])
        for name, valid in (
            ("optimizer", OPTIMIZERS),
            ("lr_scheduler", LR_SCHEDULERS),
            ("warmup_type", WARMUP_TYPES),
            ("lune_mode", LUNE_MODES),
            ("snr_kind", SNR_KINDS),
            ("compile_mode", (None, *COMPILE_MODES)),
        ):
            value = getattr(self, name)
            if value not in valid:
                names = [item for item in valid if item is not None]
                raise ConfigError(
                    f"trainer.{name} '{value}' is unknown{nearest(str(value), names)}: "
                    f"choose one of {', '.join(names)}"
                )
        for tracker in self.trackers:
            if tracker not in PACKAGES:
                raise ConfigError(
                    f"trainer.trackers has '{tracker}', which is unknown"
                    f"{nearest(tracker, PACKAGES)}: choose from {', '.join(PACKAGES)}"
                )
        for name in ("gradient_accumulation", "total_steps", "log_every", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "sample_steps",
            "max_nonfinite_steps",
            "sample_height",
            "sample_width",
            "shift_tokens",
        ):
            self._require(
                name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more"
            )
        for name in (
            "save_every_steps",
            "save_every_epochs",
            "sample_every",
            "validate_every",
            "upload_every_steps",
            "upload_every_epochs",
        ):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or null for never")
        for name in ("keep_last_n_steps", "keep_last_n_epochs"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lune_dropout", "sol_dropout", "text_dropout"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("ema_decay", "val_fraction"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("learning_rate", "shift", "snr_gamma", "huber_delta"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "grad_clip", "warmup_steps", "min_lr", "logit_std"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        if self.hf_repo_id is None and (self.upload_every_steps or self.upload_every_epochs):
            raise ConfigError("trainer.upload_every_* needs trainer.hf_repo_id, where to upload to")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "between 0 and 1")
        self._require(
            "dtype",
            self.dtype in (torch.float32, torch.bfloat16),
            "float32 or bfloat16 (float16 gradients overflow)",
        )

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ConfigError(f"trainer.{name} must be {what}, not {getattr(self, name)!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0.

        Schedules are read one step ahead: the first step of a warm-up already moves the weights.
        """
        step += 1
        floor = min(1.0, self.min_lr / self.learning_rate)
        if self.lr_scheduler == "constant":
            factor = constant_with_warmup(step, self.warmup_steps, self.warmup_type)
        else:
            schedule = cosine_schedule if self.lr_scheduler == "cosine" else linear_decay
            factor = schedule(step, self.total_steps, self.warmup_steps, floor, self.warmup_type)
        return self.learning_rate * factor

    def ema_decay_at(self, step: int) -> float:
        """The EMA's decay in optimizer step ``step``, counted from 0.

        With a warm-up it is ``min(ema_decay, (1 + step) / (10 + step))``: the average reaches over
        about the last tenth of the steps done until that is as far as ``ema_decay`` reaches.
        Without one, ``ema_decay ** n`` of the average after n steps is the random first weights.
        """
        if not self.ema_warmup:
            return self.ema_decay
        return min(self.ema_decay, (1 + step) / (10 + step))
