"""What a run's pictures are measured against beside training: held-out rows of its first cache."""

import logging

from torch import Tensor

from tinyflux.data.mixture import CacheMixture
from tinyflux.distributed.evaluation_parts import (
    Part,
    RealPictures,
    draw_settings,
    drawn_parts,
    has_features,
    read_features,
    real_parts,
    write_features,
)
from tinyflux.distributed.evaluation_sets import list_cache_set
from tinyflux.distributed.training_job import TrainingJob
from tinyflux.evaluation.config import HELD_OUT
from tinyflux.evaluation.drawing import features_of
from tinyflux.evaluation.extractors import FeatureExtractor, open_extractor
from tinyflux.inference.sampler import Sampler
from tinyflux.model.zoo import ModelZoo
from tinyflux.storage.folder import Folder
from tinyflux.storage.remote import open_folder
from tinyflux.trainer.picture_figures import PictureFigures

logger = logging.getLogger(__name__)


def open_picture_figures(job: TrainingJob, zoo: ModelZoo, sampler: Sampler) -> PictureFigures:
    """The figures of ``tinyflux evaluate`` for the same rows, weights and settings.

    Features of the real pictures are taken from the cache, and what is missing is left there.

    Args:
        zoo: the run's, which the sampler draws with.
        sampler: of the student and its EMA.

    Raises:
        TinyFluxError: too few held-out pictures, or an extractor that cannot be opened.
    """
    config = job.trainer
    extractors = [open_extractor(name, sampler.device) for name in job.evaluate.extractors]
    data = CacheMixture(job.data[:1], check_files=False)
    chosen = list_cache_set(
        HELD_OUT, data, config.val_fraction, config.evaluate_pictures, zoo.downscale
    )
    shift, place = job.model.latent_shift, job.data[0].path
    real = [] if chosen is None else real_parts(chosen, job.zoo, shift)
    drawn = [] if chosen is None else drawn_parts(chosen, job.sample, weights="", turn=0)
    features = {}
    if real:
        folder, pictures = open_folder(place), RealPictures(place, zoo, shift)
        features = {one.fingerprint: _features(folder, real, pictures, one) for one in extractors}
    return PictureFigures(
        sampler,
        extractors,
        [part.drawn(zoo.downscale) for part in drawn],
        features,
        draw_settings(job.sample),
        job.evaluate.retrieval_among,
    )


def _features(
    folder: Folder, parts: list[Part], pictures: RealPictures, extractor: FeatureExtractor
) -> Tensor:
    """``[N, D]`` of real pictures, made where they are missing."""
    missing = [part for part in parts if not has_features(folder, part, extractor.fingerprint)]
    for part in missing:
        write_features(folder, part, features_of([extractor], pictures.of(part)))
    logger.info(
        "evaluate: features of %d of %d real pictures were there, by %s",
        sum(len(part.rows) for part in parts if part not in missing),
        sum(len(part.rows) for part in parts),
        extractor.name,
    )
    return read_features(folder, parts, extractor.fingerprint)
