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
            pictures reach.
    """

    extractor: str
    fingerprint: str
    figures: dict[str, Estimate] = field(default_factory=dict)


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
    """

    name: str
    count: int
    drawn: int
    spaces: list[SpaceFigures] = field(default_factory=list)
    groups: list[GroupFigures] = field(default_factory=list)


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
