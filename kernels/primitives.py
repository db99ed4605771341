"""Named pieces that the kernels are made of: row tiles, LayerNorm, GELU, depthwise taps, softmax, sums over programs.

A matrix of rows is given by a pointer and `offs_row` (M,), the int64 element offset at which each row starts; rows and
columns outside the matrix read as 0. Arithmetic is fp32; matrix products take operands of the weights' type and
accumulate in fp32. A norm is the tuple (weight_ptr, bias_ptr, eps).
"""

import triton
import triton.language as tl

# Triton's interpreter keeps bf16 as raw 16-bit patterns: its casts truncate and its dot multiplies the patterns, so
# under it `round_to` and `dot` spell out what the hardware does.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in another type, fp32 rounded to nearest, ties to even."""
    if INTERPRETED and (x.dtype == tl.float32 and dtype == tl.bfloat16):
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; a is rounded to the type of b first."""
    a = round_to(a, b.dtype)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiply_add(a, b, c):
    """a * b + c in the type of c, rounded once."""
    if INTERPRETED:  # whose fma rounds twice
        return round_to(a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32), c.dtype)
    else:
        return tl.fma(a, b, c)


@triton.jit
def is_last(counter_ptr, programs):
    """Whether this is the last of `programs` programs to come here; what the others stored before is then visible.

    The counter is 0 before the first and after the last.
    """
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def bound(n):
    """A run-time integer as the bound of a range: Triton 3.6's interpreter and NumPy >= 2.4 disagree about scalars."""
    if INTERPRETED:
        return tl.cast(n, tl.int64).handle.data.item()
    else:
        return n


@triton.jit
def row_offsets(offs_m, stride):
    """Element offset of each row, in 64 bits: a map of 2^31 elements or more is ordinary at large batch."""
    return offs_m.to(tl.int64) * stride


@triton.jit
def split_index(index, height, width):
    """Flat row-major index over (batch, height, width) -> batch, row, column."""
    batch = index // (height * width)
    rest = index - batch * (height * width)
    return batch, rest // width, rest % width


@triton.jit
def load_rows(ptr, offs_row, row_mask, offs_k, COLUMNS: tl.constexpr):
    """A tile (M, K) of rows, as stored."""
    mask = row_mask[:, None] & (offs_k < COLUMNS)[None, :]
    return tl.load(ptr + offs_row[:, None] + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def load_sum(ptr, offs_row, row_mask, offs_k, parts, part_stride, COLUMNS: tl.constexpr):
    """A tile (M, K) of rows in fp32, summed over `parts` matrices that lie `part_stride` elements apart."""
    tile = load_rows(ptr, offs_row, row_mask, offs_k, COLUMNS).to(tl.float32)
    for part in range(1, bound(parts)):
        offset = tl.cast(part, tl.int64) * part_stride
        tile += load_rows(ptr + offset, offs_row, row_mask, offs_k, COLUMNS).to(tl.float32)
    return tile


@triton.jit
def load_weight(ptr, offs_n, offs_k, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile (K, N) of the transpose of a weight (ROWS, COLUMNS) whose rows lie `stride` elements apart."""
    mask = (offs_k < COLUMNS)[:, None] & (offs_n < ROWS)[None, :]
    return tl.load(ptr + offs_n[None, :] * stride + offs_k[:, None], mask=mask, other=0.0)


@triton.jit
def load_vector(ptr, offs, SIZE: tl.constexpr):
    """A vector in fp32; 0 past its end."""
    return tl.load(ptr + offs, mask=offs < SIZE, other=0.0).to(tl.float32)


@triton.jit
def tile_moments(x, offs_k, count, COLUMNS: tl.constexpr):
    """Mean and sum of squared deviations of each row of a tile (M, K) that holds `count` columns."""
    mean = tl.sum(x, 1) / count
    deviation = tl.where((offs_k < COLUMNS)[None, :], x - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def inverse_deviation(squares, count, eps):
    """1 / sqrt(squares / count + eps); NaN of a variance that overflowed, where 0 would leave the bias alone."""
    variance = squares / count + eps
    return variance * 0.0 + tl.rsqrt(variance)


@triton.jit
def row_statistics(source, offs_row, row_mask, eps, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of each row. source: (ptr, parts, part_stride) of `load_sum`.

    One pass; moments of column blocks are merged by Chan's formula, so a mean far above the spread loses nothing.
    """
    mean = tl.zeros_like(offs_row).to(tl.float32)
    squares = mean
    for start in range(0, C, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = load_sum(source[0], offs_row, row_mask, offs_k, source[1], source[2], C)
        before = tl.cast(start, tl.float32)
        count = tl.cast(tl.minimum(C - start, BLOCK_K), tl.float32)
        block_mean, block_squares = tile_moments(x, offs_k, count, C)
        shift = block_mean - mean
        mean += shift * (count / (before + count))
        # shift is the mean itself at first, whose square may overflow
        squares += block_squares + shift * (shift * (before * count / (before + count)))
    return mean, inverse_deviation(squares, C, eps)


@triton.jit
def normalize(x, mean, rstd, norm, offs_k, C: tl.constexpr):
    """(x - mean) * rstd * weight + bias on a tile (M, K); 0 in the columns past C."""
    weight, bias = load_vector(norm[0], offs_k, C), load_vector(norm[1], offs_k, C)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def norm_tile(x, norm, offs_k, C: tl.constexpr):
    """LayerNorm of rows that lie in one fp32 tile (M, K >= C)."""
    mean, squares = tile_moments(x, offs_k, C, C)
    return normalize(x, mean, inverse_deviation(squares, C, norm[2]), norm, offs_k, C)


@triton.jit
def norm_rows(source, offs_row, row_mask, norm, META: tl.constexpr):
    """Rows to be multiplied after act(LayerNorm(.)), for `rows_product`.

    HELD: a tuple of tiles (M, BLOCK_K) in the type of the products' operands, once for all products. Where matrix units
    read operands from shared memory they lie there; others would need registers for them, and get what it takes to
    normalise again at each use. source: (ptr, parts, part_stride) of `load_sum`.
    META: (C, BLOCK_K, GELU, EXACT, dtype, HELD).
    """
    C: tl.constexpr = META[0]
    BLOCK_K: tl.constexpr = META[1]
    mean, rstd = row_statistics(source, offs_row, row_mask, norm[2], C, BLOCK_K)
    unheld = (source, offs_row, row_mask, mean, rstd, norm)
    if META[5]:
        rows = ()
        for start in tl.static_range(0, C, BLOCK_K):
            rows += (normalized_tile(unheld, start + tl.arange(0, BLOCK_K), META),)
        return rows
    else:
        return unheld


@triton.jit
def normalized_tile(unheld, offs_k, META: tl.constexpr):
    """Columns of rows that `norm_rows` does not hold."""
    source = unheld[0]
    x = load_sum(source[0], unheld[1], unheld[2], offs_k, source[1], source[2], META[0])
    y = normalize(x, unheld[3], unheld[4], unheld[5], offs_k, META[0])
    if META[2]:
        y = gelu(y, META[3])
    return round_to(y, META[4])


@triton.jit
def rows_product(acc, rows, weight, offs_n, N: tl.constexpr, META: tl.constexpr, PRECISION: tl.constexpr):
    """acc + rows @ weight^T, tile (M, BLOCK_N): rows of `norm_rows` with its META, weight (ptr, stride) of (N, C)."""
    C: tl.constexpr = META[0]
    BLOCK_K: tl.constexpr = META[1]
    if META[5]:
        for t in tl.static_range(len(rows)):
            offs_k = t * BLOCK_K + tl.arange(0, BLOCK_K)
            acc = dot(rows[t], load_weight(weight[0], offs_n, offs_k, weight[1], N, C), acc, PRECISION)
    else:
        for start in range(0, C, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            y = normalized_tile(rows, offs_k, META)
            acc = dot(y, load_weight(weight[0], offs_n, offs_k, weight[1], N, C), acc, PRECISION)
    return acc


@triton.jit
def gelu_erf(x):
    """x * Phi(x) to fp32 accuracy."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_polynomial(x):
    """x * Phi(x) to 1.3e-4: Phi - 1/2 as an odd polynomial on [-4, 4], exactly +-1/2 at its ends.

    So are the rounded sums, as 4 is a power of two: any slip would grow with x. 12 instructions and no branch, against
    25 for erf, and closer than the tanh form (4.7e-4). Half a unit in the last place of bf16 at 1 is 2e-3, of fp16
    2.4e-4.
    """
    z = tl.minimum(tl.maximum(x, -4.0), 4.0)
    u = z * z
    p = -9.70419745e-10 * u + 8.41579961e-08
    p = p * u + -3.15933130e-06
    p = p * u + 6.82760801e-05
    p = p * u + -0.000956433243
    p = p * u + 0.00928673521
    p = p * u + -0.0653953552
    p = p * u + 0.398288012
    return x * (0.5 + z * p)


@triton.jit
def gelu_quarter(x):
    """gelu(4 x) / 4 of fp16 values in packed fp16 arithmetic: rms error 2e-4, at most 2.2e-3 of max(|gelu|, 1 / 2).

    Phi(4 z) - 1/2 as z times a polynomial in z^2 - 1/2 on [-1, 1]: the quarter keeps its coefficients in fp16's range,
    and the half keeps them from cancelling. At the ends it is +-1/2 exactly, so that large negative values give 0.
    bf16 rounds by up to 3.9e-3.
    """
    one = tl.full([1, 1], 1.0, tl.float16)
    z = tl.minimum(tl.maximum(x, -one), one)
    u = multiply_add(z, z, -0.5 * one)
    p = multiply_add(u, 1.5234375 * one, -2.111328125 * one)
    p = multiply_add(p, u, 1.55078125 * one)
    p = multiply_add(p, u, -1.134765625 * one)
    p = multiply_add(p, u, 0.88427734375 * one)
    p = multiply_add(p, u, -0.67578125 * one)
    p = multiply_add(p, u, 0.7041015625 * one)
    return x * multiply_add(z, p, 0.5 * one)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU of fp32 values: exact for fp32 results, a polynomial for 16-bit ones."""
    if EXACT:
        return gelu_erf(x)
    else:
        return gelu_polynomial(x)


@triton.jit
def depthwise_rows(ptrs, row_stride, column_stride, taps_ptr, offs_h, bias, META: tl.constexpr):
    """3x3 depthwise convolution at ROWS vertically adjacent outputs: a tuple of ROWS tiles (P, H) in the taps' type.

    ptrs (P, H) point at the top left tap of the first output; taps_ptr is (9, stride). Each loaded element feeds up to
    three outputs, so ROWS = 4 takes 18 loads where four single rows take 36. Taps in fp16 beside a map in fp16 give two
    multiply-adds per instruction and no conversions. META: (stride, ROWS).
    """
    ROWS: tl.constexpr = META[1]
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    out = (tl.zeros(ptrs.shape, dtype) + bias[None, :],) * ROWS
    for j in tl.static_range(3):
        h = ()
        for i in tl.static_range(ROWS + 2):
            h += (tl.load(ptrs + (i * row_stride + j * column_stride)).to(dtype),)
        for i in tl.static_range(3):
            tap = tl.load(taps_ptr + (3 * i + j) * META[0] + offs_h)[None, :]
            new = ()
            for r in tl.static_range(ROWS):
                new += (multiply_add(h[r + i], tap, out[r]),)
            out = new
    return out


@triton.jit
def attend_block(q, k_t, v, key_mask, PRECISION: tl.constexpr):
    """softmax2(q k^T) v with all keys in one block: q (M, D) times scale * log2(e), k_t (D, KEYS), v (KEYS, D)."""
    scores = dot(q, k_t, tl.zeros([q.shape[0], k_t.shape[1]], tl.float32), PRECISION)
    scores = tl.where(key_mask[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return dot(p, v, tl.zeros(q.shape, tl.float32), PRECISION) / tl.sum(p, 1)[:, None]


@triton.jit
def attend(q, kv_ptr, keys, head_column, META: tl.constexpr):
    """softmax2(q k^T) v for one head: q (M, D) times scale * log2(e), k and v rows of kv (keys, 2 C) -> (M, D) fp32.

    META: (C, HEAD_DIM, BLOCK_KEYS, ONE_BLOCK, PRECISION). With ONE_BLOCK all keys fit one block; else a running
    maximum and sum go over the blocks.
    """
    C: tl.constexpr = META[0]
    BLOCK_KEYS: tl.constexpr = META[2]
    offs_d = tl.arange(0, q.shape[1])
    offs_key = tl.arange(0, BLOCK_KEYS)
    d_mask = offs_d < META[1]
    k_ptrs = kv_ptr + head_column + offs_key[None, :] * (2 * C) + offs_d[:, None]
    v_ptrs = kv_ptr + C + head_column + offs_key[:, None] * (2 * C) + offs_d[None, :]
    if META[3]:
        key_mask = offs_key < keys
        k_t = tl.load(k_ptrs, mask=d_mask[:, None] & key_mask[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=key_mask[:, None] & d_mask[None, :], other=0.0)
        return attend_block(q, k_t, v, key_mask, META[4])
    else:
        no_scores = tl.zeros([q.shape[0], BLOCK_KEYS], tl.float32)
        out = tl.zeros(q.shape, tl.float32)
        best = tl.full([q.shape[0]], float("-inf"), tl.float32)
        total = tl.zeros([q.shape[0]], tl.float32)
        for start in range(0, bound(keys), BLOCK_KEYS):
            key_mask = offs_key + start < keys
            k_t = tl.load(k_ptrs + start * (2 * C), mask=d_mask[:, None] & key_mask[None, :], other=0.0)
            v = tl.load(v_ptrs + start * (2 * C), mask=key_mask[:, None] & d_mask[None, :], other=0.0)
            scores = tl.where(key_mask[None, :], dot(q, k_t, no_scores, META[4]), float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))
            # as long as all scores are minus infinity a key weighs nothing; if they stay so, 0 / 0 is NaN
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            p = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(best - shift)
            total = total * decay + tl.sum(p, 1)
            out = dot(p, v, out * decay[:, None], META[4])
            best = new_best
        return out / total[:, None]


@triton.jit
def add_residual(x, z, scale_ptr, batch, mask, SCALED: tl.constexpr):
    """x + z on a tile (M, N), or x + scale[batch] * z with one scale per sample."""
    if SCALED:
        z = z * tl.load(scale_ptr + batch, mask=mask, other=0.0).to(tl.float32)[:, None]
    return x.to(tl.float32) + z
