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
from tinyflux.evaluation.neighbours import TrainedOn, nearest_label_accuracy
from tinyflux.evaluation.record import GroupFigures, SpaceFigures

# Fewer pictures have no neighbours enough.
FEWEST = DC_NEIGHBOURS + 1
# Before a metric's name: what the real pictures reach, what guessing does, and what the training
# pictures do that are nearest to the drawn ones, or to the real ones.
REAL, CHANCE, NEAREST = "real_", "chance_", "nearest_"
WORDS = ((1, 3), (4, 7), (8, 15), (16, 10**9))


@dataclass
class Pictures:
    """Features of a set's real pictures and of those drawn for their captions, by one extractor.

    Attributes:
        real: ``[N, D]``.
        drawn: ``[N * seeds, D]``, all of a seed behind all of the one before.
        captions: N captions.
        labels: N values of each label column.
        trained: The pictures that the student was trained on, where they are known.
    """

    real: Tensor
    drawn: Tensor
    captions: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    trained: TrainedOn | None = None

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
            self.trained,
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
    if pictures.trained is not None and pictures.labels:
        made |= _nearest_figures(pictures, pictures.trained)
    held_out = extractor.config.accuracy if isinstance(extractor, ClassifierFeatures) else {}
    return SpaceFigures(extractor.name, extractor.fingerprint, made, dict(held_out))


def _caption_figures(
    extractor: CaptionExtractor, pictures: Pictures, among: int
) -> dict[str, Estimate]:
    texts = list(pictures.captions)
    embedded = extractor.captions(texts)
    repeated = embedded.repeat(pictures.seeds, 1)
    made = {
        "clip_score": clip_score(pictures.drawn, repeated),
        f"{REAL}clip_score": clip_score(pictures.real, embedded),
    }
    if len(pictures.real) >= FEWEST:
        made["cmmd"] = cmmd(pictures.drawn, pictures.real)
        made["retrieval"] = retrieval(pictures.drawn, repeated, texts * pictures.seeds, among)
        made[f"{REAL}retrieval"] = retrieval(pictures.real, embedded, texts, among)
    return made


def _label_figures(extractor: ClassifierFeatures, pictures: Pictures) -> dict[str, Estimate]:
    """Accuracies of each label that the classifier has, beside the real pictures' and chance.

    The classifier chooses among all its labels, among the set's, and among those that the student
    was trained on.
    """
    made = {}
    drawn, real = extractor.logits(pictures.drawn), extractor.logits(pictures.real)
    trained = pictures.trained.labels if pictures.trained is not None else {}
    for label, wanted in pictures.labels.items():
        names = extractor.config.labels.get(label, [])
        chosen_of = {"": names, "_among_set": wanted, "_among_trained": trained.get(label, ())}
        for behind, labels in chosen_of.items():
            choice = set(labels) & set(names)
            if not choice & set(wanted):
                continue
            among = choice if behind else None
            metric, values = f"{label}_accuracy{behind}", list(wanted) * pictures.seeds
            made[metric] = label_accuracy(drawn[label], names, values, among)
            made[f"{REAL}{metric}"] = label_accuracy(real[label], names, wanted, among)
            made[f"{CHANCE}{metric}"] = Estimate(
                1 / len(choice), note=f"one of {len(choice)} labels"
            )
    return made


def _nearest_figures(pictures: Pictures, trained: TrainedOn) -> dict[str, Estimate]:
    """How often the training picture shows the label that is nearest to the drawn or real one."""
    repeated = {name: list(values) * pictures.seeds for name, values in pictures.labels.items()}
    drawn = nearest_label_accuracy(pictures.drawn, trained, repeated)
    real = nearest_label_accuracy(pictures.real, trained, pictures.labels)
    return {
        f"{prefix}{NEAREST}{label}_accuracy": one
        for prefix, made in (("", drawn), (REAL, real))
        for label, one in made.items()
    }


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
