"""All metrics that an extractor's features allow, for a set and for its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from tinyflux.evaluation.captions import clip_score, retrieval
from tinyflux.evaluation.classifier import ClassifierFeatures
from tinyflux.evaluation.estimate import Estimate
from tinyflux.evaluation.extractors import CaptionExtractor, FeatureExtractor
from tinyflux.evaluation.frechet import fid
from tinyflux.evaluation.labels import label_accuracy
from tinyflux.evaluation.manifolds import DC_NEIGHBOURS, manifolds
from tinyflux.evaluation.mmd import cmmd, kid
from tinyflux.evaluation.record import GroupFigures, SpaceFigures

# Fewer pictures have no neighbours enough.
FEWEST = DC_NEIGHBOURS + 1
WORDS = ((1, 3), (4, 7), (8, 15), (16, 10**9))


@dataclass
class Pictures:
    """Features of a set's real pictures and of those drawn for their captions, by one extractor.

    Attributes:
        real: ``[N, D]``.
        drawn: ``[N * seeds, D]``, all of a seed behind all of the one before.
        captions: N captions.
        labels: N values of each label column.
    """

    real: Tensor
    drawn: Tensor
    captions: Sequence[str]
    labels: Mapping[str, Sequence[str]]

    @property
    def seeds(self) -> int:
        """Pictures drawn for each caption."""
        return len(self.drawn) // len(self.real)

    def part(self, rows: Sequence[int]) -> "Pictures":
        """Those of some real pictures and of their captions."""
        drawn = [row + seed * len(self.real) for seed in range(self.seeds) for row in rows]
        return Pictures(
            self.real[list(rows)],
            self.drawn[drawn],
            [self.captions[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.labels.items()},
        )


def figures(extractor: FeatureExtractor, pictures: Pictures, among: int) -> SpaceFigures:
    """Every metric that the extractor allows.

    Args:
        among: captions that a picture has to find its own among.
    """
    made: dict[str, Estimate] = {}
    if min(len(pictures.real), len(pictures.drawn)) >= FEWEST:
        made["kid"] = kid(pictures.drawn, pictures.real)
        made["fid"] = fid(pictures.drawn, pictures.real)
        spread = manifolds(pictures.drawn, pictures.real)
        made |= {name: Estimate(**value) for name, value in asdict(spread).items()}
    if isinstance(extractor, CaptionExtractor):
        made |= _caption_figures(extractor, pictures, among)
    if isinstance(extractor, ClassifierFeatures):
        made |= _label_figures(extractor, pictures)
    return SpaceFigures(extractor.name, extractor.fingerprint, made)


def _caption_figures(
    extractor: CaptionExtractor, pictures: Pictures, among: int
) -> dict[str, Estimate]:
    texts = list(pictures.captions)
    embedded = extractor.captions(texts)
    repeated = embedded.repeat(pictures.seeds, 1)
    made = {
        "clip_score": clip_score(pictures.drawn, repeated),
        "real_clip_score": clip_score(pictures.real, embedded),
    }
    if len(pictures.real) >= FEWEST:
        made["cmmd"] = cmmd(pictures.drawn, pictures.real)
        made["retrieval"] = retrieval(pictures.drawn, repeated, texts * pictures.seeds, among)
        made["real_retrieval"] = retrieval(pictures.real, embedded, texts, among)
    return made


def _label_figures(extractor: ClassifierFeatures, pictures: Pictures) -> dict[str, Estimate]:
    """Accuracies of each label that the classifier has, among all labels and among the set's."""
    made = {}
    drawn, real = extractor.logits(pictures.drawn), extractor.logits(pictures.real)
    for name, wanted in pictures.labels.items():
        names = extractor.config.labels.get(name, [])
        known = set(wanted) & set(names)
        if not known:
            continue
        for prefix, logits, times in (("", drawn, pictures.seeds), ("real_", real, 1)):
            values = list(wanted) * times
            made[f"{prefix}{name}_accuracy"] = label_accuracy(logits[name], names, values)
            made[f"{prefix}{name}_accuracy_among_set"] = label_accuracy(
                logits[name], names, values, known
            )
    return made


def grouped(
    extractors: Sequence[FeatureExtractor],
    pictures: Sequence[Pictures],
    columns: Mapping[str, Sequence[str]],
    smallest: int,
    among: int,
) -> list[GroupFigures]:
    """Figures by each column's values and by the captions' numbers of words.

    Args:
        pictures: of one set, by each of the extractors.
        columns: N values by name.
        smallest: fewest pictures of a part that is told of; a column of one value divides nothing.
    """
    words = [words_of(caption) for caption in pictures[0].captions]
    parts = []
    for by, values in {**columns, "caption words": words}.items():
        for value in sorted(set(values)) if len(set(values)) > 1 else ():
            rows = [row for row, own in enumerate(values) if own == value]
            if len(rows) < smallest:
                continue
            spaces = [
                figures(extractor, part.part(rows), among)
                for extractor, part in zip(extractors, pictures, strict=True)
            ]
            parts.append(GroupFigures(by, value, len(rows), spaces))
    return parts


def words_of(caption: str) -> str:
    """The range of :data:`WORDS` that a caption's number of words is in, such as ``"4 to 7"``."""
    count = max(1, len(caption.split()))
    low, high = next((low, high) for low, high in WORDS if low <= count <= high)
    return f"{low} to {high}" if high < WORDS[-1][1] else f"{low} or more"
