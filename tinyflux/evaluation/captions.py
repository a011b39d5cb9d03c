"""Do pictures show their captions, by CLIP: the CLIP score and prompt retrieval."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tinyflux.errors import InputError
from tinyflux.evaluation.estimate import Estimate, mean_estimate, share_estimate


def clip_score(pictures: Tensor, captions: Tensor) -> Estimate:
    """CLIPScore (Hessel et al., arXiv 2104.08718) as torchmetrics has it: ``100 max(cos, 0)``.

    Args:
        pictures: ``[N, D]`` CLIP embeddings of pictures.
        captions: ``[N, D]`` of their captions.
    """
    _check_pairs(pictures, captions)
    cosines = (normalize(pictures.double(), dim=1) * normalize(captions.double(), dim=1)).sum(1)
    return mean_estimate(100 * cosines.clamp(min=0))


def retrieval(
    pictures: Tensor, captions: Tensor, texts: Sequence[str], among: int = 100
) -> Estimate:
    """The share of pictures that are nearer to their own caption than to the others of a group.

    Groups of ``among`` pictures are cut in order, and a last part that is smaller is left out if
    there is a whole one, so that the figure means the same for any number of pictures. Chance is 1
    of a group's different captions. Equal captions are one.

    Args:
        pictures: ``[N, D]`` CLIP embeddings of pictures.
        captions: ``[N, D]`` of their captions.
        texts: the N captions.
        among: captions to choose from.
    """
    _check_pairs(pictures, captions)
    if among < 2:
        raise InputError(f"retrieval must be among at least 2 captions, not {among}")
    size = min(among, len(texts))
    hits = []
    for start in range(0, len(texts) - size + 1, size):
        part = slice(start, start + size)
        cosines = normalize(pictures[part].double(), dim=1) @ normalize(
            captions[part].double(), dim=1
        ).T  # fmt: skip
        number = {text: index for index, text in enumerate(dict.fromkeys(texts[part]))}
        same = torch.tensor([number[text] for text in texts[part]])
        own = cosines.diagonal()[:, None]
        other = same[:, None] != same[None, :]
        # A tie is no find: captions that a model cannot tell apart are not told apart.
        hits.append(~((cosines >= own) & other).any(1))
    found = torch.cat(hits)
    estimate = share_estimate(found)
    if size < among:
        note = f"among {size} captions, not {among}, as there are no more"
        return Estimate(estimate.value, estimate.low, estimate.high, estimate.count, note)
    return estimate


def _check_pairs(pictures: Tensor, captions: Tensor) -> None:
    if pictures.shape != captions.shape or pictures.ndim != 2 or not len(pictures):
        raise InputError(
            "pictures and captions must have embeddings [N, D] of one shape, not "
            f"{tuple(pictures.shape)} and {tuple(captions.shape)}"
        )
