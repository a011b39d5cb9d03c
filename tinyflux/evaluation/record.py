"""The record of an evaluation: what stands under ``measured`` in ``evaluation.json``."""

from dataclasses import dataclass, field

from tinyflux.evaluation.estimate import Estimate

FORMAT_VERSION = 1


@dataclass
class SpaceFigures:
    """Figures by one extractor.

    Attributes:
        extractor: Its name.
        fingerprint: What tells its weights and its preparation of pictures from others'.
        figures: Estimates by metric, such as ``kid``; ``real_`` before a name is what the real
            pictures reach, ``chance_`` what guessing does, and ``nearest_`` what the training
            pictures do that are nearest.
        held_out: What a classifier itself reaches on real pictures that it never saw, as it was
            measured when it was trained; it may have seen the set's.
    """

    extractor: str
    fingerprint: str
    figures: dict[str, Estimate] = field(default_factory=dict)
    held_out: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class DrawnPicture:
    """A drawn picture that is kept to be looked at.

    Attributes:
        caption: What was asked for.
        file: Its place in the run's directory.
        real: The place there of the set's own picture; empty where it is the cache's.
    """

    caption: str
    file: str
    real: str = ""


@dataclass
class GroupFigures:
    """Figures of a part of a set.

    Attributes:
        by: What divides the set: ``size``, ``caption words`` or a column.
        value: What the part has of it.
        count: Real pictures of the part.
        spaces: Figures by extractor.
    """

    by: str
    value: str
    count: int
    spaces: list[SpaceFigures] = field(default_factory=list)


@dataclass
class SetFigures:
    """Figures of a set.

    Attributes:
        name: The set's name.
        count: Real pictures.
        drawn: Drawn pictures, ``count`` times the number of seeds.
        spaces: Figures by extractor.
        groups: Figures of parts that are large enough.
        pictures: The first that were drawn.
    """

    name: str
    count: int
    drawn: int
    spaces: list[SpaceFigures] = field(default_factory=list)
    groups: list[GroupFigures] = field(default_factory=list)
    pictures: list[DrawnPicture] = field(default_factory=list)


@dataclass
class Measured:
    """An evaluation's figures.

    Attributes:
        weights: Fingerprint of the student's weights.
        num_steps: Denoising steps of a picture.
        guidance_scale: Scale of classifier-free guidance.
        seeds: Pictures of each caption.
        sets: Figures by set.
        format_version: Of this record.
    """

    weights: str
    num_steps: int
    guidance_scale: float
    seeds: int
    sets: list[SetFigures] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
