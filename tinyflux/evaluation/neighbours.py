"""What would memory reach? The labels of the training pictures that are nearest to others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyflux.evaluation.estimate import Estimate, check_features, share_estimate

BLOCK = 1024  # rows of a distance matrix at once


@dataclass
class TrainedOn:
    """Pictures that a student was trained on.

    Attributes:
        features: ``[M, D]`` by one extractor.
        labels: M values of each label column.
    """

    features: Tensor
    labels: Mapping[str, Sequence[str]]


def nearest_rows(features: Tensor, others: Tensor) -> Tensor:
    """``[N]``: for each row of ``[N, D]``, which row of ``[M, D]`` is nearest; the first of equals.

    Raises:
        InputError: shapes that do not fit, or values that are no numbers.
    """
    check_features(features, others, least=1)
    y = others.double()
    return torch.cat([torch.cdist(part.double(), y).argmin(1) for part in features.split(BLOCK)])


def nearest_label_accuracy(
    features: Tensor, trained: TrainedOn, wanted: Mapping[str, Sequence[str]]
) -> dict[str, Estimate]:
    """By label column, how often the nearest training picture shows what is wanted.

    A column that the training pictures lack, or none of whose wanted labels they have, is left out.

    Args:
        features: ``[N, D]`` of pictures, by the extractor of the training pictures' features.
        wanted: N labels by column; pictures whose label no training picture has are left out of
            the column's share, with a note.

    Raises:
        InputError: shapes that do not fit, or values that are no numbers.
    """
    rows = nearest_rows(features, trained.features).tolist()
    made = {}
    for name, labels in wanted.items():
        has = trained.labels.get(name, ())
        known = set(has)
        right = [
            has[row] == label for row, label in zip(rows, labels, strict=True) if label in known
        ]
        if not right:
            continue
        share = share_estimate(torch.tensor(right))
        left = len(rows) - len(right)
        note = f"{left} pictures have a label that no training picture has" if left else ""
        made[name] = Estimate(share.value, share.low, share.high, share.count, note)
    return made
