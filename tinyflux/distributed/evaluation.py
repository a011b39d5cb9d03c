"""What looks at a run's weights while it is trained: on its held-out rows, with its prompts."""

from dataclasses import replace

import torch

from tinyflux.data.mixture import CacheMixture
from tinyflux.data.reader import read_held_out
from tinyflux.distributed.picture_figures import open_picture_figures
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.inference.sampler import Sampler
from tinyflux.model.model import TinyFluxDeep
from tinyflux.model.zoo import ModelZoo
from tinyflux.trainer.adapter import fit_adapter
from tinyflux.trainer.ema import EMA
from tinyflux.trainer.evaluation import Evaluator


def is_evaluated(job: TrainingJob) -> bool:
    """Whether the run's weights are ever looked at."""
    config = job.trainer
    looked_at = config.validate_every is not None or config.evaluate_every is not None
    return looked_at or _draws(job)


def build_evaluator(job: TrainingJob, device: torch.device) -> Evaluator:
    """The run's evaluator, with a model and an EMA of its own and the models that it draws with."""
    model = TinyFluxDeep(job.model).to(device)
    fit_adapter(model, job.trainer)
    ema = EMA(model, job.trainer.ema_decay)
    return build_local_evaluator(job, model, ema, job.open_data(check_files=False))


def build_local_evaluator(
    job: TrainingJob, model: TinyFluxDeep, ema: EMA, data: CacheMixture
) -> Evaluator:
    """The run's evaluator of this ``model`` and its whole ``ema``."""
    config, device = job.trainer, next(model.parameters()).device
    held_out = None
    if config.validate_every is not None:
        held_out = read_held_out(data, data.held_out(config.val_fraction))
    sampler = figures = None
    if _draws(job) or config.evaluate_every is not None:
        zoo = _load_encoders(job, device)
        sampler = Sampler(zoo, model, ema, device, config.dtype) if _draws(job) else None
        # As `tinyflux evaluate` draws, in the precision of the encoders.
        if config.evaluate_every is not None:
            measured = Sampler(zoo, model, ema, device, job.zoo.dtype)
            figures = open_picture_figures(job, zoo, measured)
    return Evaluator(model, ema, config, data.t_buckets, held_out, sampler, figures)


def _load_encoders(job: TrainingJob, device: torch.device) -> ModelZoo:
    """What pictures are drawn with; a model that is missing is told now."""
    zoo = replace(job.zoo, device=str(device)).build(job.model)
    zoo.load_vae()
    zoo.load_t5()
    zoo.load_clip()
    return zoo


def _draws(job: TrainingJob) -> bool:
    return job.trainer.sample_every is not None and bool(job.trainer.sample_prompts)
