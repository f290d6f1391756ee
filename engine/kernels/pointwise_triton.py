"""Pointwise passes for GPUs, in Triton: the kernels that `engine.kernels.pointwise` launches.

Imported only where Triton is. Offsets are 64 bits and the whole grid is in the first dimension, as
in `fused_triton`. Everything is fp32 between a load and a store.
"""

import triton
import triton.language as tl


@triton.jit
def geglu(
    projected, out, rows, inner, blocks, projected_row, out_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = hidden * gelu(gate) of ROWS tokens by COLUMNS, where `projected` is [hidden, gate].

    A number is stored where the same program has read, if anybody does, so that `out` may be
    `hidden`.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < inner)
    places = projected + row * projected_row + column
    hidden = tl.load(places, mask, 0.0).to(tl.float32)
    gate = tl.load(places + inner, mask, 0.0).to(tl.float32)
    y = hidden * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + row * out_row + column, y.to(out.dtype.element_ty), mask)


@triton.jit
def add(x, y, bias, size, channels, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """x += y + bias, BLOCK numbers of `size`, of which each `channels` in a row are a token."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    total = tl.load(x + place, mask, 0.0).to(tl.float32)
    total += tl.load(y + place, mask, 0.0).to(tl.float32)
    if BIASED:
        total += tl.load(bias + place % channels, mask, 0.0).to(tl.float32)
    tl.store(x + place, total.to(x.dtype.element_ty), mask)


@triton.jit
def put(
    out, y, bias, height, size, channels, blocks, out_batch, out_row, out_column, y_batch, y_row,
    y_column, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = y + bias, BLOCK numbers of a row that has `size`, `channels` of each pixel."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    picture, row = (row // height).to(tl.int64), (row % height).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    column, channel = (place // channels).to(tl.int64), place % channels
    mask = place < size
    y += picture * y_batch + row * y_row
    value = tl.load(y + column * y_column + channel, mask, 0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + channel, mask, 0.0).to(tl.float32)
    out += picture * out_batch + row * out_row
    tl.store(out + column * out_column + channel, value.to(out.dtype.element_ty), mask)
