"""Resize a picture that lies in bands: each rank makes its own rows of the larger picture.

    own rows [B, C, h, W] of H -> the input rows that the own output rows reach, fetched from
    whichever ranks have them -> along the columns, then along the rows -> own rows of H2

An output pixel is a weighted sum of a few input pixels in each direction. Enlarging takes the four
nearest by the cubic kernel of Keys (1981, "Cubic convolution interpolation for digital image
processing") with a = -0.75. Reducing widens the kernel (a = -0.5) by the factor, so that it
averages all the pixels that one output pixel stands for. These are the conventions of torch's
`F.interpolate(mode="bicubic")` without and with `antialias`, whose results they give.
"""

import math

import torch
from torch import Tensor

from engine.bands.boundary import Layout
from engine.bands.exchange import fetch_rows

Size = tuple[int, int]
"""height, width"""

_CHUNK_ROWS = 64


def resize(
    layout: Layout, pixels: Tensor, size: Size, new_size: Size, multiple: int = 1
) -> tuple[range, Tensor]:
    """This rank's rows of the picture of `size`, resized to `new_size`.

    Args:
        pixels: [B, C, h, W], the rows `layout.own(layout.bands(H, multiple))`.

    Returns:
        (rows of the new picture, [B, C, h2, W2])

    Raises:
        UserError: more ranks than the new picture has blocks of `multiple` rows.
    """
    have, bands = (layout.bands(height, multiple) for height in (size[0], new_size[0]))
    want = [input_rows(size[0], new_size[0], band) for band in bands]
    rows, there = layout.own(bands), layout.own(want)
    if layout.exchange is not None:
        mesh = layout.exchange.mesh
        pixels = fetch_rows(mesh, layout.traffic, _Resizing, pixels, have, want)
    columns = taps(size[1], new_size[1], range(new_size[1]))
    out = pixels.new_empty(*pixels.shape[:2], len(rows), new_size[1])
    for first in range(rows.start, rows.stop, _CHUNK_ROWS):
        chunk = range(first, min(first + _CHUNK_ROWS, rows.stop))
        indices, weights = taps(size[0], new_size[0], chunk)
        resized = _weigh(_weigh(pixels, indices - there.start, weights, 2), *columns, 3)
        out[:, :, chunk.start - rows.start : chunk.stop - rows.start] = resized
    return rows, out


def resize_rows(picture: Tensor, size: Size, new_size: Size, rows: range) -> Tensor:
    """Rows `rows` of a whole picture [B, C, H, W] resized: nothing is fetched from anywhere."""
    columns = taps(size[1], new_size[1], range(new_size[1]))
    return _weigh(_weigh(picture, *columns, 3), *taps(size[0], new_size[0], rows), 2)


class _Resizing:
    """Labels the rows fetched in the count of traffic."""

    traffic_kind = "resizing"


def input_rows(size: int, new_size: int, rows: range) -> range:
    """The run of input rows that output `rows` are made of."""
    indices, _ = taps(size, new_size, rows)
    return range(int(indices.min()), int(indices.max()) + 1)


def taps(size: int, new_size: int, outputs: range) -> tuple[Tensor, Tensor]:
    """Which of `size` pixels make each of the `outputs` of `new_size`, and how much of each.

    Returns:
        (indices [n, k], weights [n, k] in float64), the weights of each output adding up to 1.
        Beyond its edge a picture that is enlarged goes on as its last pixel is; one that is reduced
        is weighed without.
    """
    step = size / new_size
    places = (torch.arange(outputs.start, outputs.stop, dtype=torch.float64) + 0.5) * step
    if new_size >= size:
        first = (places - 0.5).floor() - 1
        indices = first[:, None] + torch.arange(4)
        weights = _cubic(places[:, None] - 0.5 - indices, a=-0.75)
        return indices.clamp(0, size - 1).long(), weights
    first = (places - 2 * step).floor()
    indices = first[:, None] + torch.arange(math.ceil(4 * step) + 2)
    weights = _cubic((indices + 0.5 - places[:, None]) / step, a=-0.5)
    weights[(indices < 0) | (indices >= size)] = 0
    return indices.clamp(0, size - 1).long(), weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys's kernel: 1 at 0, 0 at all other whole numbers and beyond 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _weigh(x: Tensor, indices: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Sums over taps along `dim`, one tap at a time: no temporary is larger than the result."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = [-1 if d == dim else 1 for d in range(4)]
    total: Tensor | None = None
    for index, weight in zip(indices.T.to(x.device), weights.T.to(x.device, dtype), strict=True):
        part = x.index_select(dim, index).to(dtype).mul_(weight.view(shape))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
