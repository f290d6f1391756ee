"""Convolutions: by chunks of rows where tensors are large, and of a doubled picture by phases.

Nearest-neighbour doubling makes four pixels of each, and a 3x3 convolution of these sees the same
pixel of the original two or four times. So its weights can be added up first. Of rows (columns are
alike), with weights w0 w1 w2 and the original's rows ... p, x, n ... :

    row 2i      reads p, x, x      w0 p + (w1 + w2) x
    row 2i + 1  reads x, x, n      (w0 + w1) x + w2 n

Each of the four phases (even and odd rows, even and odd columns) of the result is thus a 2x2
convolution of the original: 4/9 of the multiplications, and the doubled picture is never made. Each
is taken of the whole original, a row and a column too many, for its own window would be a copy. It
is sub-pixel convolution (Shi et al. 2016, arXiv:1609.05158) read backwards; the same result up to
rounding.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import pointwise
from engine.kernels.layout import layout_of, room_for

MAX_ELEMENTS = 2**31 - 1  # what 32-bit indices reach, in convolution kernels


def convolve_by_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The convolution of [B, C, h, W], by chunks of rows where it or the result is large.

    A chunk of output rows i ... j - 1 reads the rows i * stride - padding and on, and what of
    these lies beyond the edges of x is the convolution's zeros.
    """
    batch, channels, height, width = x.shape
    step, reach = stride[0], dilation[0] * (weight.shape[2] - 1) + 1
    rows = (height + 2 * padding[0] - reach) // step + 1
    row_elements = batch * width * max(channels * step, len(weight))
    rows_at_once = max(1, MAX_ELEMENTS // row_elements - reach)
    if rows <= rows_at_once:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    out: Tensor | None = None
    for start in range(0, rows, rows_at_once):
        first = start * step - padding[0]
        last = (min(start + rows_at_once, rows) - 1) * step - padding[0] + reach
        zeros = (0, 0, max(0, -first), max(0, last - height))
        piece = x[:, :, max(0, first) : last]
        piece = F.pad(piece, zeros) if any(zeros) else piece
        y = F.conv2d(piece, weight, bias, stride, (0, padding[1]), dilation, groups)
        out = room_for(y, rows) if out is None else out
        out[:, :, start : start + rows_at_once] = y
    assert out is not None
    return out


_LEAST_PIXELS = 256  # of a picture whose phases cost less than folding the weights does


def convolve_doubled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int] | None = None,
    fused: bool = False,
) -> Tensor:
    """The 3x3 convolution, zeros around it, of a picture doubled by nearest neighbours.

    Args:
        x: [B, C, h + 2, w], the picture between the rows above and below, which are zeros where it
            ends.
        weight: [C', C, 3, 3]
        size: rows and columns of the result, where it ends a row or a column earlier than 2h, 2w.
        fused: phases are put in their places by a kernel of `engine.kernels.pointwise`, where it
            can, which adds the bias: cuDNN's convolutions add none, and torch in a pass of its own.

    Returns:
        [B, C', 2h, 2w], or as `size` says
    """
    batch, _, rows, width = x.shape
    doubled = (2 * (rows - 2), 2 * width)
    if size not in (None, doubled) or (rows - 2) * width < _LEAST_PIXELS:
        return _convolve_doubled_plainly(x, weight, bias, size or doubled)
    layout, put = layout_of(x), pointwise.put if fused else pointwise.plain_put
    early, late = (None, bias) if fused else (bias, None)
    out = torch.empty(
        (batch, len(weight), *doubled), dtype=x.dtype, device=x.device, memory_format=layout
    )
    for row, column in product((0, 1), repeat=2):
        weights = phase_weights(weight, row, column).contiguous(memory_format=layout)
        # With a row and a column more than the phase has: its window of x would be a copy.
        y = convolve_by_rows(x, weights, early, padding=(0, 1))
        own = y[:, :, row : row + rows - 2, column : column + width]
        put(out[:, :, row::2, column::2], own, late)
    return out


def phase_weights(weight: Tensor, row: int, column: int) -> Tensor:
    """The 2x2 weights of the even (0) or odd (1) rows and columns, [C', C, 3, 3] -> [C', C, 2, 2].

    Folded anew in each call, which costs little: the weights may change, by a LoRA for example.
    """
    rows = _fold(weight.unbind(2), row)
    return torch.stack([torch.stack(_fold(each.unbind(2), column), 2) for each in rows], 2)


def _fold(weights: Sequence[Tensor], place: int) -> list[Tensor]:
    first, middle, last = weights
    return [first, middle + last] if place == 0 else [first + middle, last]


def _convolve_doubled_plainly(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]
) -> Tensor:
    doubled = F.interpolate(x, scale_factor=2.0)[:, :, 1 : size[0] + 3, : size[1]]
    if size[0] < 2 * (x.shape[2] - 2):  # so the picture ends here
        doubled[:, :, size[0] + 1 :] = 0
    return convolve_by_rows(doubled, weight, bias, padding=(0, 1))
