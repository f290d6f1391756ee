"""Linear attention for GPUs, in Triton: the two kernels that `engine.kernels.fused` launches.

Imported only where Triton is. Triton's tiles are powers of two, and heads often are not: 40 is
padded to 64, 80 to 128 and 160 to 256, of which a program makes 64 columns.

    state    one head's phi(k)^T [v, 1] over TOKENS tokens: [d, d+1] fp32, one of many partial sums
    apply    TOKENS queries of one head: phi(q) S / (phi(q) z + eps)

Offsets are 64 bits, since keys of 4 million tokens by 640 channels are more than 2^31 numbers, and
the whole grid is in the first dimension, the only one that may pass 65535. Strides come in units of
UNIT numbers, so that the compiler knows that heads of 40 begin where 16 bytes are read at once; by
itself it looks for multiples of 16 alone.
"""

import triton
import triton.language as tl


@triton.jit
def _phi(x):
    """elu(x) + 1 in fp32, without its cancellation; NaN stays NaN, which min and max would lose."""
    x = x.to(tl.float32)
    return tl.where(x > 0, x + 1, tl.exp(tl.where(x > 0, 0.0, x)))


@triton.jit
def _begin(pair, heads, first, batch_stride, head_stride, row_stride):
    """Where the first token of a head of a picture is."""
    return (pair // heads) * batch_stride + (pair % heads) * head_stride + first * row_stride


@triton.jit
def _load(base, rows, columns, row_stride, column_stride, count, HEAD: tl.constexpr):
    """[rows, columns] of one head, zeros where there are none."""
    mask = (rows < count)[:, None] & (columns < HEAD)[None, :]
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    return tl.load(base + rows * row_stride + columns * column_stride, mask, 0.0)


@triton.jit
def _store(base, rows, columns, row_stride, column_stride, count, HEAD: tl.constexpr, x):
    """The opposite of `_load`."""
    mask = (rows < count)[:, None] & (columns < HEAD)[None, :]
    rows, columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    tl.store(base + rows * row_stride + columns * column_stride, x, mask)


@triton.jit
def _load_phi(base, rows, columns, row_stride, column_stride, count, HEAD: tl.constexpr):
    """phi of `_load`, and zero, not phi(0) = 1, for tokens that there are not."""
    x = _load(base, rows, columns, row_stride, column_stride, count, HEAD)
    return tl.where((rows < count)[:, None], _phi(x), 0.0)


@triton.jit
def state(
    key, value, partials, tokens, heads, pairs, blocks,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    UNIT: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[split, pair] = phi(k)^T [v, 1] of TOKENS tokens; a pair is a picture and a head.

    COLUMNS of them. Neighbouring programs take neighbouring heads of the same tokens, which lie
    side by side.
    """
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    pair, split = (place % pairs).to(tl.int64), place // pairs
    first = split.to(tl.int64) * TOKENS
    key += _begin(pair, heads, first, key_batch, key_head, key_row) * UNIT
    value += _begin(pair, heads, first, value_batch, value_head, value_row) * UNIT
    count = tl.minimum(tokens - first, TOKENS).to(tl.int32)
    i, j = tl.arange(0, WIDE), block * COLUMNS + tl.arange(0, COLUMNS)
    total, z = tl.zeros([WIDE, COLUMNS], tl.float32), tl.zeros([WIDE], tl.float32)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        # What is summed up to z is what is multiplied: weights that were rounded alike still
        # average values.
        k = _load_phi(key, rows, i, key_row * UNIT, key_column, count, HEAD)
        k = k.to(key.dtype.element_ty).to(OPERAND)
        v = _load(value, rows, j, value_row * UNIT, value_column, count, HEAD).to(OPERAND)
        total = tl.dot(tl.trans(k), v, total, input_precision=PRECISION)
        z += tl.sum(k.to(tl.float32), 0)
    partials += place.to(tl.int64) * (HEAD * (HEAD + 1))
    _store(partials, i, j, HEAD + 1, 1, HEAD, HEAD, total)
    tl.store(partials + i * (HEAD + 1) + HEAD, z, (i < HEAD) & (block == 0))


@triton.jit
def apply(
    query, mean_state, out, tokens, heads, pairs, blocks, eps,
    query_batch, query_head, query_row, query_column, out_batch, out_head, out_row, out_column,
    UNIT: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = phi(q) S / (phi(q) z + eps), COLUMNS of it for TOKENS tokens, which read S and z once.

    In half precision S is the sum of two numbers, scaled to be 1 at the most, and so is each row of
    phi(q), which the division takes back: nothing overflows, and nothing is too small to be seen.
    """
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    pair = (place % pairs).to(tl.int64)
    first = (place // pairs).to(tl.int64) * TOKENS
    query += _begin(pair, heads, first, query_batch, query_head, query_row) * UNIT
    out += _begin(pair, heads, first, out_batch, out_head, out_row) * UNIT
    mean_state += pair * (HEAD * (HEAD + 1))
    count = tl.minimum(tokens - first, TOKENS).to(tl.int32)
    HALF: tl.constexpr = query.dtype.element_ty != tl.float32
    i, j = tl.arange(0, WIDE), block * COLUMNS + tl.arange(0, COLUMNS)
    s = _load(mean_state, i, j, HEAD + 1, 1, HEAD, HEAD)
    z = tl.load(mean_state + i * (HEAD + 1) + HEAD, i < HEAD, 0.0)
    if HALF:
        largest = tl.max(tl.max(tl.abs(s), 1), 0)
        largest = tl.where(largest == 0, 1.0, largest)
        s = s / largest
        high = s.to(OPERAND)
        low = (s - high.to(tl.float32)).to(OPERAND)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q = _load(query, rows, i, query_row * UNIT, query_column, count, HEAD).to(tl.float32)
        phi = _phi(q)
        if HALF:
            # What pads a head is phi(0) = 1, which no small row is scaled for.
            phi = tl.where((i < HEAD)[None, :], phi, 0.0)
            scale = 1 / tl.maximum(tl.max(phi, 1), 1e-30)
            scaled = (phi * scale[:, None]).to(OPERAND)
            mixed = tl.dot(scaled, high)
            mixed = tl.dot(scaled, low, mixed)
            norm = tl.sum(scaled.to(tl.float32) * z[None, :], 1) + eps * scale
            mixed = mixed * (largest / norm)[:, None]
        else:
            norm = tl.sum(phi * z[None, :], 1) + eps
            mixed = tl.dot(phi, s, input_precision=PRECISION) / norm[:, None]
        mixed = mixed.to(out.dtype.element_ty)
        _store(out, rows, j, out_row * UNIT, out_column, count, HEAD, mixed)
