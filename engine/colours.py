"""Colours that do not drift: what a thumbnail of the picture shows stays as it was.

    own rows of pixels [1, 3, h, W] --means over areas, summed over ranks--> thumbnail [1, 3, s, t]
    pixels + enlarged (wanted thumbnail - own thumbnail)

A VAE does not give back quite the colours that it was given, and the ladder goes through it once a
rung: contrast and hue creep. Super-resolution by diffusion meets this by handing the low
frequencies of the picture that it began with on to its result (the colour correction of Wang et
al. 2023, StableSR, arXiv:2305.07015). Here the low frequencies are those of a thumbnail, so that a
few thousand numbers are all that the ranks sum.
"""

import torch
from torch import Tensor

from engine.bands.boundary import Layout
from engine.bands.resize import resize_rows

_CHUNK_ROWS = 64  # whose change is held at a time


Size = tuple[int, int]
"""height, width"""


def thumbnail_size(size: Size, side: int) -> Size:
    """Of a thumbnail whose longer side is `side`, of a picture of `size`."""
    scale = side / max(size)
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


def thumbnail(layout: Layout, pixels: Tensor, rows: range, height: int, small: Size) -> Tensor:
    """Means over areas of a picture of which each rank has its own rows: [1, 3, s, t].

    Args:
        pixels: [1, 3, h, W], its rows `rows` of `height`.
        small: (s, t)
    """
    width = pixels.shape[-1]
    over_rows = _areas(height, small[0], rows).to(pixels)
    over_columns = _areas(width, small[1], range(width)).to(pixels)
    own = over_rows @ (pixels @ over_columns.transpose(0, 1))
    return own if layout.exchange is None else layout.exchange.sum(_Colours, own)


def keep_colours(
    layout: Layout, pixels: Tensor, rows: range, height: int, wanted: Tensor
) -> Tensor:
    """Change `pixels`, in place, so that their thumbnail is about `wanted` [1, 3, s, t]."""
    size = (height, pixels.shape[-1])
    # Not as this picture's shape would have it: sides are rounded to 8 px, another way each rung.
    small = (wanted.shape[-2], wanted.shape[-1])
    now = thumbnail(layout, pixels, rows, height, small)
    for top in range(rows.start, rows.stop, _CHUNK_ROWS):
        chunk = range(top, min(top + _CHUNK_ROWS, rows.stop))
        change = resize_rows(wanted.to(now) - now, small, size, chunk)
        pixels[:, :, chunk.start - rows.start : chunk.stop - rows.start] += change
    return pixels


def _areas(length: int, parts: int, places: range) -> Tensor:
    """How much of the mean over each of `parts` equal areas comes from each place: [parts, n]."""
    edges = torch.arange(parts + 1, dtype=torch.float64) * (length / parts)
    start = torch.arange(places.start, places.stop, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return shared.clamp(min=0) * (parts / length)


class _Colours:
    """Labels the sums in the count of traffic."""

    traffic_kind = "colours"
