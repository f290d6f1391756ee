"""Linear attention for GPUs, in Triton: the two kernels that `engine.kernels.fused` launches.

Imported only where Triton is. Triton's tiles are powers of two, and heads often are not. 40 is
padded to 64; a wider one may be two tiles, 80 = 64 + 16, 160 = 128 + 32: were 160 padded to 256,
its products would take 2.6 times the FLOPs, and its state all registers that an SM has.

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
def _to_tf32(x):
    """To the nearest number of 10 bits of mantissa: hardware cuts the rest off, which is a bias."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the sum of a NaN's bits may be zero's


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
    key, value, partials, tokens, heads, pairs,
    key_batch, key_head, key_row, key_column, value_batch, value_head, value_row, value_column,
    UNIT: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[split, pair] = phi(k)^T [v, 1] of TOKENS tokens; a pair is a picture and a head.

    Neighbouring programs take neighbouring heads of the same tokens, which lie side by side.
    """
    split, pair = tl.program_id(0) // pairs, (tl.program_id(0) % pairs).to(tl.int64)
    first = split.to(tl.int64) * TOKENS
    key += _begin(pair, heads, first, key_batch, key_head, key_row) * UNIT
    value += (
        (pair // heads) * value_batch + (pair % heads) * value_head + first * value_row
    ) * UNIT
    count = tl.minimum(tokens - first, TOKENS).to(tl.int32)
    i, j = tl.arange(0, WIDE), WIDE + tl.arange(0, NARROW or 1)
    ii, z_i = tl.zeros([WIDE, WIDE], tl.float32), tl.zeros([WIDE], tl.float32)
    if NARROW:
        ij, ji = tl.zeros([WIDE, NARROW], tl.float32), tl.zeros([NARROW, WIDE], tl.float32)
        jj, z_j = tl.zeros([NARROW, NARROW], tl.float32), tl.zeros([NARROW], tl.float32)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        # What is summed up to z is what is multiplied: weights that were rounded alike still
        # average values.
        k_i = _load_phi(key, rows, i, key_row * UNIT, key_column, count, HEAD)
        k_i = k_i.to(key.dtype.element_ty).to(OPERAND)
        v_i = _load(value, rows, i, value_row * UNIT, value_column, count, HEAD).to(OPERAND)
        ii = tl.dot(tl.trans(k_i), v_i, ii, input_precision=PRECISION)
        z_i += tl.sum(k_i.to(tl.float32), 0)
        if NARROW:
            k_j = _load_phi(key, rows, j, key_row * UNIT, key_column, count, HEAD)
            k_j = k_j.to(key.dtype.element_ty).to(OPERAND)
            v_j = _load(value, rows, j, value_row * UNIT, value_column, count, HEAD).to(OPERAND)
            ij = tl.dot(tl.trans(k_i), v_j, ij, input_precision=PRECISION)
            ji = tl.dot(tl.trans(k_j), v_i, ji, input_precision=PRECISION)
            jj = tl.dot(tl.trans(k_j), v_j, jj, input_precision=PRECISION)
            z_j += tl.sum(k_j.to(tl.float32), 0)
    partials += tl.program_id(0).to(tl.int64) * (HEAD * (HEAD + 1))
    _store(partials, i, i, HEAD + 1, 1, HEAD, HEAD, ii)
    tl.store(partials + i * (HEAD + 1) + HEAD, z_i, i < HEAD)
    if NARROW:
        _store(partials, i, j, HEAD + 1, 1, HEAD, HEAD, ij)
        _store(partials, j, i, HEAD + 1, 1, HEAD, HEAD, ji)
        _store(partials, j, j, HEAD + 1, 1, HEAD, HEAD, jj)
        tl.store(partials + j * (HEAD + 1) + HEAD, z_j, j < HEAD)


@triton.jit
def apply(
    query, mean_state, out, tokens, heads, pairs, eps,
    query_batch, query_head, query_row, query_column, out_batch, out_head, out_row, out_column,
    UNIT: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """out = phi(q) S / (phi(q) z + eps) for TOKENS tokens, which read S and z once.

    Everything is fp32 until it is divided; the products are of fp32 numbers, or of TF32.
    """
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    first = (tl.program_id(0) // pairs).to(tl.int64) * TOKENS
    query += (
        (pair // heads) * query_batch + (pair % heads) * query_head + first * query_row
    ) * UNIT
    out += _begin(pair, heads, first, out_batch, out_head, out_row) * UNIT
    mean_state += pair * (HEAD * (HEAD + 1))
    count = tl.minimum(tokens - first, TOKENS).to(tl.int32)
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    i, j = tl.arange(0, WIDE), WIDE + tl.arange(0, NARROW or 1)
    ii = _load(mean_state, i, i, HEAD + 1, 1, HEAD, HEAD)
    z_i = tl.load(mean_state + i * (HEAD + 1) + HEAD, i < HEAD, 0.0)
    ii = _to_tf32(ii) if TF32 else ii
    if NARROW:
        ij = _load(mean_state, i, j, HEAD + 1, 1, HEAD, HEAD)
        ji = _load(mean_state, j, i, HEAD + 1, 1, HEAD, HEAD)
        jj = _load(mean_state, j, j, HEAD + 1, 1, HEAD, HEAD)
        z_j = tl.load(mean_state + j * (HEAD + 1) + HEAD, j < HEAD, 0.0)
        if TF32:
            ij, ji, jj = _to_tf32(ij), _to_tf32(ji), _to_tf32(jj)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q_i = _load_phi(query, rows, i, query_row * UNIT, query_column, count, HEAD)
        q_i = _to_tf32(q_i) if TF32 else q_i
        out_i = tl.dot(q_i, ii, input_precision=PRECISION)
        normaliser = tl.sum(q_i * z_i[None, :], 1) + eps
        if NARROW:
            q_j = _load_phi(query, rows, j, query_row * UNIT, query_column, count, HEAD)
            q_j = _to_tf32(q_j) if TF32 else q_j
            out_i = tl.dot(q_j, ji, out_i, input_precision=PRECISION)
            out_j = tl.dot(q_i, ij, input_precision=PRECISION)
            out_j = tl.dot(q_j, jj, out_j, input_precision=PRECISION)
            normaliser += tl.sum(q_j * z_j[None, :], 1)
            out_j = (out_j / normaliser[:, None]).to(out.dtype.element_ty)
            _store(out, rows, j, out_row * UNIT, out_column, count, HEAD, out_j)
        out_i = (out_i / normaliser[:, None]).to(out.dtype.element_ty)
        _store(out, rows, i, out_row * UNIT, out_column, count, HEAD, out_i)
