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

    For each height the widest one, up to `aspect` times longer than wide or wider than high; where
    all of those are longer, the largest square.
    """
    most = side * side
    found = set()
    for short in range(multiple, side + 1, multiple):
        long = most // short // multiple * multiple
        if long <= aspect * short:
            found |= {(short, long), (long, short)}
    square = side // multiple * multiple
    return sorted(found or ({(square, square)} if square else ()))


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
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    # Both at once: scaled as a whole, a line of one pixel by thousands would fill the memory.
    y, bottom = _span(top, height, scaled[0], picture.height)
    x, right = _span(left, width, scaled[1], picture.width)
    made = picture.resize((width, height), Image.Resampling.LANCZOS, (x, y, right, bottom))
    return Cut(made, scaled, (top, left))


def _span(start: int, length: int, scaled: int, own: int) -> tuple[float, float]:
    """From where to where that part of a side of `scaled` px is, where the side has `own` px."""
    return start / scaled * own, min((start + length) / scaled * own, own)
