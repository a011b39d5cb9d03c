"""Is what a picture should show what a classifier sees in it?"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tinyflux.errors import InputError
from tinyflux.evaluation.estimate import Estimate, share_estimate


def label_accuracy(
    logits: Tensor,
    names: Sequence[str],
    wanted: Sequence[str],
    among: Collection[str] | None = None,
) -> Estimate:
    """The share of pictures whose most likely label is the wanted one.

    Args:
        logits: ``[N, C]`` of a classifier's head.
        names: the C labels of the head.
        wanted: N labels; pictures whose label the head does not have are left out, with a note.
        among: labels to choose from, such as those that a model was trained on; None: all of them.

    Raises:
        InputError: shapes that do not fit, or no picture that the head can judge.
    """
    if logits.shape != (len(wanted), len(names)):
        raise InputError(
            f"logits {list(logits.shape)} do not fit {len(wanted)} pictures and {len(names)} labels"
        )
    allowed = set(names) if among is None else set(names) & set(among)
    places = {name: index for index, name in enumerate(names) if name in allowed}
    judged = [index for index, label in enumerate(wanted) if label in places]
    if not judged:
        raise InputError(f"the classifier has none of the wanted labels, such as '{wanted[:1]}'")
    forbidden = torch.tensor([name not in allowed for name in names])
    best = logits[judged].masked_fill(forbidden, -math.inf).argmax(1)
    right = best == torch.tensor([places[wanted[index]] for index in judged])
    estimate = share_estimate(right)
    notes = []
    if among is not None:
        notes.append(f"chosen among {len(allowed)} labels")
    if left := len(wanted) - len(judged):
        others = "the classifier does not know" if among is None else "is none of them"
        notes.append(f"{left} pictures have a label that {others}")
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.count, "; ".join(notes))
