"""Norms over channels that lie side by side, in Triton: what `engine.kernels.norms` launches.

Imported only where Triton is. A picture here is [B, n, C]: n tokens of C channels in one piece, a
fixed number of elements from token to token. Offsets are 64 bits, and everything is fp32 between a
load and a store.
"""

import triton
import triton.language as tl


@triton.jit
def channel_moments(
    x, partials, size, channels, splits, blocks, x_batch, x_token,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partials[picture, split] = [mean, sum of squares about it] of TOKENS tokens: [2, C] fp32.

    Tile by tile, each summed up in two passes over registers, and joined to what came before (Chan
    et al. 1983), so that no large sums cancel.
    """
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    picture, split = (place // splits).to(tl.int64), place % splits
    first = split.to(tl.int64) * TOKENS
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    x += picture * x_batch + first * x_token + column
    tokens = tl.minimum(size - first, TOKENS).to(tl.int32)
    mean, squares = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, tokens, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < tokens)[:, None] & (column < channels)[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * x_token, mask, 0.0).to(tl.float32)
        count = tl.minimum(tokens - start, ROWS).to(tl.float32)
        own = tl.sum(values, 0) / count
        away = tl.where(mask, values - own[None, :], 0.0)
        total, delta = start + count, own - mean
        mean += delta * (count / total)
        squares += tl.sum(away * away, 0) + delta * delta * (start * count / total)
    partials += place.to(tl.int64) * 2 * channels + column
    tl.store(partials, mean, column < channels)
    tl.store(partials + channels, squares, column < channels)


@triton.jit
def group_norm(
    x, mean, variance, weight, bias, shift, out, size, channels, per_group, groups, rows, blocks,
    eps, x_batch, x_token, out_batch, out_token, shift_batch, AFFINE: tl.constexpr,
    SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = (x + shift - mean) / sqrt(variance + eps) * weight + bias, and SiLU of it.

    `mean` and `variance` are [B, groups] of x + shift.
    """
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    picture = (place // rows).to(tl.int64)
    row = (place % rows).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels
    group = picture * groups + column // per_group
    centre = tl.load(mean + group, known, 0.0)
    scale = tl.rsqrt(tl.load(variance + group, known, 1.0) + eps)
    if SHIFTED:
        centre -= tl.load(shift + picture * shift_batch + column, known, 0.0).to(tl.float32)
    mask = (row < size) & known[None, :]
    y = tl.load(x + picture * x_batch + row * x_token + column[None, :], mask, 0.0).to(tl.float32)
    y = (y - centre[None, :]) * scale[None, :]
    if AFFINE:
        y = y * tl.load(weight + column, known, 0.0).to(tl.float32)[None, :]
        y = y + tl.load(bias + column, known, 0.0).to(tl.float32)[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    out += picture * out_batch + row * out_token + column[None, :]
    tl.store(out, y.to(out.dtype.element_ty), mask)


@triton.jit
def layer_norm(
    x, weight, bias, out, rows, channels, eps, slope,
    AFFINE: tl.constexpr, LEAKY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / sqrt(variance + eps) * weight + bias of ROWS tokens, and LeakyReLU of it.

    A token is read once, in two passes over registers. `out` may be `x`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    known = column < channels
    mask = (row < rows) & known[None, :]
    places = row * channels + column[None, :]
    y = tl.load(x + places, mask, 0.0).to(tl.float32)
    away = tl.where(mask, y - tl.sum(y, 1)[:, None] / channels, 0.0)
    y = away * tl.rsqrt(tl.sum(away * away, 1) / channels + eps)[:, None]
    if AFFINE:
        y = y * tl.load(weight + column, known, 0.0).to(tl.float32)[None, :]
        y = y + tl.load(bias + column, known, 0.0).to(tl.float32)[None, :]
    if LEAKY:
        y = tl.where(y < 0, y * slope, y)
    tl.store(out + places, y.to(out.dtype.element_ty), mask)
