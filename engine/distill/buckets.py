"""Shapes that pictures are cut to, so that those of a batch are alike and little is cut off.

All shapes of a set have about as many pixels, side x side (NovelAI's aspect-ratio buckets, 2022).
A picture goes to the shape whose aspect ratio is nearest, is scaled to cover it and cut in its
middle.
"""

import math
from dataclasses import dataclass

from PIL import Image

Shape = tuple[int, int]
"""(height, width) in pixels"""


def shapes_of(side: int, multiple: int, aspect: float) -> list[Shape]:
    """Every shape of at most side x side pixels whose sides are multiples of `multiple`.

    For each height the widest one, up to `aspect` times longer than wide or wider than high.
    """
    most = side * side
    found = set()
    for short in range(multiple, side + 1, multiple):
        long = most // short // multiple * multiple
        if long <= aspect * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest(shapes: list[Shape], height: int, width: int) -> Shape:
    """The shape of the nearest aspect ratio; of several, the largest."""

    def distance(shape: Shape) -> tuple[float, int]:
        stretch = abs(math.log(shape[0] / shape[1]) - math.log(height / width))
        return round(stretch, 6), -shape[0] * shape[1]

    return min(shapes, key=distance)


@dataclass(frozen=True)
class Cut:
    """A picture of a bucket's shape, and where it comes from.

    Attributes:
        scaled: (height, width) before it was cut, which SDXL is told as the original size.
        corner: (top, left) of the cut in that.
    """

    picture: Image.Image
    scaled: Shape
    corner: tuple[int, int]


def cut(picture: Image.Image, shape: Shape) -> Cut:
    """Scale `picture` to cover `shape`, and cut out its middle."""
    height, width = shape
    scale = max(height / picture.height, width / picture.width)
    scaled = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    if scaled != (picture.height, picture.width):
        picture = picture.resize((scaled[1], scaled[0]), Image.Resampling.LANCZOS)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    box = (left, top, left + width, top + height)
    return Cut(picture.crop(box) if scaled != shape else picture, scaled, (top, left))
