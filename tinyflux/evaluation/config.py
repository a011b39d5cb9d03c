"""The ``evaluate`` section of a run file."""

from dataclasses import dataclass, field

from tinyflux.errors import ConfigError

HELD_OUT, TRAIN = "held_out", "train"
CACHE_SETS = (HELD_OUT, TRAIN)


@dataclass
class EvaluationSet:
    """Real pictures with captions that a model is measured against.

    Attributes:
        name: The set's name in the record.
        file: A Parquet file, at a path or a URL, with a picture's bytes and a caption a row.
        image_key: The pictures' column.
        caption_key: The captions' column.
        labels: Columns whose values the extractor ``classifier`` should see in a drawn picture,
            each the name of one of its heads, such as ``thing`` and ``style``.
        group_by: Columns by whose values the figures are also told.
        about: What the set tells, in a sentence for the report.
    """

    name: str
    file: str
    image_key: str = "image"
    caption_key: str = "text"
    labels: list[str] = field(default_factory=list)
    group_by: list[str] = field(default_factory=list)
    about: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.file:
            raise ConfigError("each of evaluate.sets needs a name and a file")
        if self.name in CACHE_SETS:
            raise ConfigError(
                f"evaluate.sets: '{self.name}' is the name of a part of the cache: choose another"
            )


@dataclass
class EvaluateConfig:
    """What `tinyflux evaluate` measures beside the figures that every run gets.

    Steps, guidance, seeds, actors and their batches are those of ``sample``.

    Attributes:
        extractors: What pictures are measured by: efficientnet-lite0, classifier,
            classifier:DIRECTORY, clip:NAME, dinov2:NAME or inception:FILE; an empty list measures
            nothing more.
        sets: Real pictures to measure against, beside the cache's own.
        trained_on: The pictures that the student was trained on, with ``labels``, all of them:
            figures of labels are then also told of the training pictures that are nearest to the
            drawn ones, and of a classifier that chooses among the labels that training has.
        cache_sets: Parts of the cache to measure against, decoded: held_out, train.
        count: The most pictures of a set; a larger set is thinned evenly.
        seeds: Pictures that are drawn for each caption, from seeds of their own.
        checkpoint: The student that is measured: a checkpoint's directory, file, hub repository or
            URL; None is the run's ``final``, with the EMA's weights.
        retrieval_among: Captions among which a picture has to find its own, with ``clip``.
        smallest_group: Fewest pictures of a group that figures are told of.
    """

    extractors: list[str] = field(default_factory=lambda: ["efficientnet-lite0"])
    sets: list[EvaluationSet] = field(default_factory=list)
    trained_on: EvaluationSet | None = None
    cache_sets: list[str] = field(default_factory=lambda: ["held_out"])
    count: int = 1000
    seeds: int = 1
    checkpoint: str | None = None
    retrieval_among: int = 100
    smallest_group: int = 16

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("seeds", 1), ("retrieval_among", 2),
                            ("smallest_group", 6)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(
                    f"evaluate.{name} must be at least {least}, not {getattr(self, name)}"
                )
        for name in self.cache_sets:
            if name not in CACHE_SETS:
                raise ConfigError(
                    f"evaluate.cache_sets: '{name}' is unknown: choose of {', '.join(CACHE_SETS)}"
                )
        names = [chosen.name for chosen in self.sets]
        if len(set(names)) < len(names):
            raise ConfigError("evaluate.sets must have different names")
        if self.trained_on is not None and not self.trained_on.labels:
            raise ConfigError(
                "evaluate.trained_on needs the columns of labels that its pictures have, such as "
                "labels: [thing, style]"
            )
