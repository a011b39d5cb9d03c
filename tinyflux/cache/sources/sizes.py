"""At which size a picture is encoded."""

import math
from functools import lru_cache

from tinyflux.cache.config import DataConfig
from tinyflux.cache.keys import Size


@lru_cache
def size_buckets(area: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Widths and heights of about the same number of pixels, sorted.

    Sides are multiples of ``step``, of at most ``area`` squared pixels together, and each is as
    long as that allows beside the other. The largest square is always one of them.
    """
    square = area // step * step
    found = {(square, square)}
    for side in range(step, int(area * math.sqrt(max_aspect)) + step, step):
        other = area * area // side // step * step
        for size in ((side, other), (other, side)):
            if min(size) >= step and max(size) <= max_aspect * min(size):
                found.add(size)
    return tuple(sorted(found))


def choose_size(width: int, height: int, data: DataConfig) -> Size:
    """Where a picture of ``width`` x ``height`` pixels goes.

    Of buckets: the largest area that the picture fills, else the smallest; there the nearest
    aspect, the more pixels of two that are as near, and the wider of two with as many.
    """
    if data.resize != "bucket":
        return data.width, data.height
    filled = [area for area in data.areas if area * area <= width * height]
    area = max(filled) if filled else min(data.areas)
    aspect = math.log(width / height)

    def distance(size: Size) -> tuple[float, int, int]:
        return abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1], -size[0]

    return min(size_buckets(area, data.step, data.max_aspect), key=distance)


def size_problem(width: int, height: int, data: DataConfig, name: str) -> str:
    """Why a picture of that size is refused; empty if it is not."""
    if data.resize != "error" or (width, height) == (data.width, data.height):
        return ""
    return (
        f"picture '{name}' is {width} x {height} pixels, not {data.width} x {data.height}: set "
        f"data.resize=crop to scale and cut pictures to that size, or bucket for the nearest of "
        f"several"
    )
