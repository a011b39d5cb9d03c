"""What a cached feature is a feature of, as short digests.

A column group is computed from some of a sample's content and by some model. Both have a digest, so
that what was computed before is known by content: a renamed file changes neither, an edited picture
only its own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Size = tuple[int, int]


def digest_of(value: Any) -> str:
    """32 hex digits of SHA-256 over bytes, or over a JSON-able value."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def sample_key(picture: str, size: Size, caption: str) -> str:
    """A sample's identity, and what its randomness comes from.

    Args:
        picture: :func:`digest_of` the picture file.
        size: width and height at which it is encoded.
    """
    return digest_of([picture, list(size), caption])


def base_of(group: str) -> str:
    """The group of plain pictures that ``group`` is another variant's of, or ``group`` itself."""
    return group.partition("-")[0]


def variant_of(group: str) -> str:
    """The name of the variant (see ``tinyflux.cache.variants``) of ``group``; empty: plain."""
    return group.partition("-")[2]


def content_keys(group: str, rows: Mapping[str, Sequence[str]], size: Size) -> list[str]:
    """What each row of ``group`` is computed from; which variant, its fingerprint says.

    Args:
        rows: columns ``key``, ``picture``, ``mask_picture`` and ``caption`` of a shard.
        size: width and height of the shard's encoded pictures.
    """
    group, is_plain = base_of(group), not variant_of(group)
    if group == "latents":
        return [digest_of([picture, list(size)]) for picture in rows["picture"]]
    if group == "mask" and not is_plain:  # cut where its picture is
        both = zip(rows["mask_picture"], rows["picture"], strict=True)
        return [digest_of([mask, picture, list(size)]) for mask, picture in both]
    if group == "mask":
        return [digest_of([mask, list(size)]) for mask in rows["mask_picture"]]
    if group == "text":
        return [digest_of(caption) for caption in rows["caption"]]
    return list(rows["key"])
