"""Pointwise passes for GPUs, in Triton: the two kernels that `engine.kernels.pointwise` launches.

Imported only where Triton is. Offsets are 64 bits and the whole grid is in the first dimension, as
in `fused_triton`. Everything is fp32 between a load and a store.
"""

import triton
import triton.language as tl


@triton.jit
def norm_silu(
    x, mean, variance, weight, bias, out, size, channels, per_group, blocks, eps,
    x_batch, x_channel, out_batch, out_channel, AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = SiLU((x - mean) / sqrt(variance + eps) * weight + bias), BLOCK numbers of one channel.

    A channel of a picture is `size` numbers in one piece, in x and in out. Its group is one of
    [B, groups], which counts on from picture to picture as the channels do.
    """
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    picture, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    group = plane // per_group
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    y = tl.load(x + picture * x_batch + channel * x_channel + places, mask, 0.0).to(tl.float32)
    y = (y - tl.load(mean + group)) * tl.rsqrt(tl.load(variance + group) + eps)
    if AFFINE:
        scale, shift = tl.load(weight + channel), tl.load(bias + channel)
        y = y * scale.to(tl.float32) + shift.to(tl.float32)
    y = y / (1 + tl.exp(-y))
    out += picture * out_batch + channel * out_channel
    tl.store(out + places, y.to(out.dtype.element_ty), mask)


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
