"""What a training run can be told."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from tinyflux.trainer.adapter_config import AdapterConfig
from tinyflux.trainer.align_config import AlignConfig
from tinyflux.trainer.config_checks import check_trainer
from tinyflux.util.picture_size import FormerSides


@dataclass
class TrainerConfig:
    """Settings of a training run.

    Attributes:
        learning_rate: The largest learning rate, after the warm-up.
        optimizer: ``"adamw"``, ``"adamw_8bit"`` (needs bitsandbytes), ``"adafactor"`` or
            ``"muon"``, which takes the matrices of the blocks and leaves the rest to AdamW.
        weight_decay: The optimizer's weight decay.
        betas: The optimizer's decay rates of its two moments.
        grad_clip: The largest gradient norm; 0 clips nothing.
        gradient_accumulation: Number of micro-batches per optimizer step.
        total_steps: Number of optimizer steps.
        warmup_steps: Optimizer steps in which the learning rate rises.
        lr_scheduler: How it falls afterwards: ``"cosine"``, ``"linear"``, ``"constant"`` or
            ``"wsd"``, which stays and falls in the last ``lr_decay_ratio`` of the steps.
        min_lr: The learning rate where it ends, if it falls.
        warmup_type: How the learning rate rises: ``"linear"`` or ``"cosine"``.
        gradient_checkpointing: Keep no activations inside blocks and compute them again in the
            backward pass.
        compile_mode: torch.compile's mode: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"``
            or ``"max-autotune-no-cudagraphs"``; None does not compile.
        shift: Time shift, of times that are 1 at the data: above 1 trains less near noise, below 1
            more. FLUX and SD3 shift the noise level instead; their 3 is 1/3 here.
        logit_normal_sampling: Draw times from a logit-normal distribution; else uniformly.
        logit_mean: Mean of that distribution's logits.
        logit_std: Standard deviation of that distribution's logits.
        use_snr_weighting: Weigh samples by min-SNR; see ``snr_kind``.
        snr_gamma: The signal-to-noise ratio above which min-SNR's weight no longer grows.
        use_huber_loss: Use the Huber loss and not the squared error.
        huber_delta: Where the Huber loss turns linear. With a delta under the residuals, which are
            near 1, a median is learned; a flow needs a mean.
        use_spatial_weighting: Weigh image tokens by the Sol teacher's map.
        enable_lune: Train with the teacher Lune's features.
        lune_weight: Weight of Lune's distillation loss.
        lune_warmup_steps: Optimizer steps in which that weight rises.
        lune_dropout: Share of samples whose forward does not see Lune, as in use. Lune and Sol drop
            by one draw, so equal shares drop both together, and a dropped caption drops both.
        lune_mode: Lune's distillation loss: ``"cosine"``, ``"mse"`` or ``"huber"``.
        enable_sol: Train with the teacher Sol's statistics and maps.
        sol_weight: Weight of Sol's distillation loss.
        sol_warmup_steps: Optimizer steps in which that weight rises.
        sol_dropout: Share of samples whose forward does not see Sol; as ``lune_dropout``.
        text_dropout: Share of samples trained on the null caption, for guidance.
        ema_decay: Decay of the weights' exponential moving average, which is what a run delivers.
        checkpoint_dir: Where the plain ``Trainer`` writes checkpoints.
        save_every_steps: Optimizer steps between checkpoints; None: no such checkpoints.
        save_every_epochs: Epochs between checkpoints; None: no such checkpoints.
        keep_last_n_steps: Checkpoints by steps that are kept.
        keep_last_n_epochs: Checkpoints by epochs that are kept.
        log_every: Optimizer steps between log lines.
        tensorboard_dir: Where the plain ``Trainer`` writes TensorBoard's files.
        sample_every: Optimizer steps between sample grids; None draws none.
        sample_prompts: Prompts of the sample grids.
        sample_dir: Where the plain ``Trainer`` writes sample grids.
        hf_repo_id: The hub repository that checkpoints are uploaded to; None uploads nothing.
        upload_every_steps: Optimizer steps between uploads; None: no such uploads.
        upload_every_epochs: Epochs between uploads; None: no such uploads.
        dtype: Precision of autocast over fp32 weights: bfloat16 or float32.
        tf32: Whether a GPU multiplies fp32 matrices in TF32, of 10 bits behind the point: all of
            them with ``dtype`` float32, with bfloat16 the few outside of autocast. It holds for the
            process; None leaves torch's own setting as it is.
        decay_matrices_only: Decay the weights of linear layers alone: no biases, gains of norms,
            gates, nor the per-head scales of Sol's map.
        lr_decay_ratio: Share of ``total_steps`` in which the schedule ``"wsd"`` falls.
        batch_size: Samples per optimizer step over all workers, for runs from a cache.
        seed: Seed of the run; every draw follows from it and from the position in the run.
        val_fraction: Held-out share of a cache.
        validate_every: Optimizer steps between validations; None: none.
        validate_times: Also tell each of validation's times apart, and take its losses under the
            null caption; this doubles what a validation takes.
        sample_steps: Denoising steps of sample grids.
        sample_guidance: Guidance scale of sample grids.
        sample_seed: Seed of sample grids.
        sample_size: Size of sample grids' pictures in pixels, such as 512 or 640x480 (width and
            height); None: that of the training data.
        sample_height: Their height in latents, the former way to say ``sample_size``; it goes with
            the next release.
        sample_width: Their width in latents, as ``sample_height``.
        trackers: Who is told the numbers: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``.
        tracker_project: The project's name there.
        ema_warmup: Let the EMA's decay rise to ``ema_decay``.
        ema_lengths: Relative lengths of power-function EMAs that are kept beside it, such as [0.05,
            0.1], out of which `tinyflux ema` mixes others after the run. None by default.
        shift_tokens: Latents of a picture (height x width) at which ``shift`` holds; larger
            pictures get more noise, smaller ones less. None: it holds for all.
        snr_kind: Whose min-SNR weight: ``"epsilon"`` prefers noisy times, ``"velocity"`` is that of
            what is predicted.
        async_checkpoints: Write checkpoints in a thread, from a copy in CPU memory.
        verify_checkpoints: Compare every byte of a checkpoint that is read with its SHA-256.
        max_nonfinite_steps: Consecutive steps with gradients that are not finite, which are
            skipped, that end the run, as is seen at its next log line.
        init_by_name: Draw each layer's first weights by the seed and its name, so that students
            that differ in some modules begin alike in all others; for runs from a cache. `tinyflux
            compare` sets it.

        init_from: Weights to begin with: a checkpoint, a run's directory (its result, or its newest
            checkpoint), a file, a URL of any of these, or a hub repository. Those of another
            ``model.patch_size`` are carried over. A run that goes on does not read them again. None
            begins with random ones.
        init_from_ema: Begin with the EMA's weights, where there are both.

        adapter: A LoRA or DoRA adapter of the library peft that is trained in place of the weights
            of ``init_from``, which stay as they are; checkpoints and the result are the adapter
            alone. None trains the weights.

        align: Targets that image tokens are held against, beside the velocity: a list of ``group``,
            ``block``, ``weight``, ``projector``, ``loss``, ``t_range``, ``stop`` and ``shuffle``.
            None by default.

        noise_generator: What draws the noise: ``"torch"``, a CPU generator for each sample, or
            ``"philox"``, by counters on the run's device, bit for bit the same numbers on each. The
            two draw other numbers, so a run that goes on keeps what it began with.

        start_at_rows: Rows of unfinished caches that a run may begin with. It takes in the shards
            that were committed meanwhile at the end of each pass, until the caches are finished.
            None waits for nothing and wants finished caches.

        evaluate_every: Optimizer steps between figures of pictures: the EMA draws held-out captions
            as ``sample`` says, and ``evaluate.extractors`` measure them. None takes none.
        evaluate_pictures: The most pictures that are drawn for them.
        best_metric: The number by which the best checkpoint is marked in ``best.json`` and kept,
            such as ``eval_kid`` or ``val_velocity_ema``; None marks none.

    Raises:
        ConfigError: a value that cannot work.
    """

    former_sides: ClassVar = FormerSides("trainer", "sample_size", "sample_height", "sample_width")

    # Optimization
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    gradient_accumulation: int = 4

    # Schedule
    total_steps: int = 100000
    warmup_steps: int = 1000
    lr_scheduler: str = "cosine"
    min_lr: float = 0.0
    warmup_type: str = "linear"

    # Memory optimization
    gradient_checkpointing: bool = False
    compile_mode: str | None = None

    # Flow matching
    shift: float = 3.0
    logit_normal_sampling: bool = True
    logit_mean: float = 0.0
    logit_std: float = 1.0

    # Loss
    use_snr_weighting: bool = True
    snr_gamma: float = 5.0
    use_huber_loss: bool = True
    huber_delta: float = 0.1
    use_spatial_weighting: bool = False

    # Expert distillation
    enable_lune: bool = True
    lune_weight: float = 0.1
    lune_warmup_steps: int = 1000
    lune_dropout: float = 0.1
    lune_mode: str = "cosine"

    enable_sol: bool = True
    sol_weight: float = 0.05
    sol_warmup_steps: int = 2000
    sol_dropout: float = 0.1

    # Text
    text_dropout: float = 0.1

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

    # Precision
    dtype: torch.dtype = torch.bfloat16

    # Beyond the published API: the recipe
    tf32: bool | None = None
    decay_matrices_only: bool = False
    lr_decay_ratio: float = 0.2

    # Beyond the published API
    batch_size: int = 64
    seed: int = 0
    val_fraction: float = 0.05
    validate_every: int | None = None
    validate_times: bool = False
    sample_steps: int = 28
    sample_guidance: float = 5.0
    sample_seed: int = 0
    sample_size: int | str | None = None
    sample_height: int | None = None
    sample_width: int | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    tracker_project: str = "tinyflux"
    ema_warmup: bool = True
    ema_lengths: list[float] = field(default_factory=list)
    shift_tokens: int | None = None
    snr_kind: str = "epsilon"
    async_checkpoints: bool = True
    verify_checkpoints: bool = True
    max_nonfinite_steps: int = 10
    init_by_name: bool = False
    init_from: str | None = None
    init_from_ema: bool = True
    adapter: AdapterConfig | None = None
    align: list[AlignConfig] = field(default_factory=list)
    noise_generator: str = "torch"
    start_at_rows: int | None = None

    # Figures of pictures beside training, and the best checkpoint
    evaluate_every: int | None = None
    evaluate_pictures: int = 100
    best_metric: str | None = None

    def __post_init__(self) -> None:
        self.betas = (self.betas[0], self.betas[1])
        self.former_sides.check(self)
        check_trainer(self)

    def ema_decay_at(self, step: int) -> float:
        """The EMA's decay in optimizer step ``step``, counted from 0.

        With a warm-up it is ``min(ema_decay, (1 + step) / (10 + step))``: the average reaches over
        about the last tenth of the steps done until that is as far as ``ema_decay`` reaches.
        Without one, ``ema_decay ** n`` of the average after n steps is the random first weights.
        """
        if not self.ema_warmup:
            return self.ema_decay
        return min(self.ema_decay, (1 + step) / (10 + step))
