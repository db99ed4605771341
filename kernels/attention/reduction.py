"""The reduced map, and from it keys and values.

`spatial_reduction_kernel` convolves LayerNorm(x) (R > 1) as one product per tap over strided rows, or multiplies the
pooled map of `pool_kernel` (the linear form). Its programs leave fp32 sums, and the last of a tile of rows
normalises them and multiplies by Wkv. Where rows are few and wide a program has one block of columns only, and the
attention kernel makes keys and values of the sums. Where rows are few the taps are divided among programs too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.config import LINEAR_POOL_SIZE
from pvt_fast.ops import HW, AttentionSpec, AttentionWeights, Norm

from .. import block_sizes
from ..launch import chip_of, dot_precision, launch
from ..primitives import (
    bound,
    dot,
    inverse_deviation,
    is_last,
    load_rows,
    load_vector,
    load_weight,
    norm_rows,
    round_to,
    row_offsets,
    rows_product,
    split_index,
    tile_moments,
)
from ..weights import dense, in_products, inputs_last, packed_off_capture
from ..workspace import workspace


@triton.jit(do_not_specialize=["images", "height", "width", "parts"])
def spatial_reduction_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    kv_norm_weight_ptr,
    kv_norm_bias_ptr,
    kv_weight_ptr,
    kv_bias_ptr,
    partial_ptr,
    counter_ptr,
    kv_ptr,
    images,
    height,
    width,
    parts,
    eps,
    kv_eps,
    C: tl.constexpr,
    R: tl.constexpr,
    LINEAR: tl.constexpr,
    EXACT: tl.constexpr,
    TO_KV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
):
    """conv_RxR(LayerNorm(x)) + b, fp32 sums (parts, rows, C): a program has a tile of rows and columns and one part of
    the taps. weight (C, R * R, C), inputs last. LINEAR: of x itself, R = 1.

    TO_KV: the last program of a tile of rows goes on to kv = act(LayerNorm(the whole sum)) @ Wkv^T + bkv.
    """
    part = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    reduced_height, reduced_width = height // R, width // R
    rows = images * reduced_height * reduced_width
    row_mask = offs_m < rows
    image, row, column = split_index(offs_m, reduced_height, reduced_width)
    first_token = (image * height + row * R) * width + column * R
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first, last = R * R * part // parts, R * R * (part + 1) // parts
    NORM: tl.constexpr = (C, BLOCK_K, False, False, dtype, HELD)
    if LINEAR:
        offs_row = row_offsets(offs_m, C)
        for start in range(0, C, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            a = load_rows(x_ptr, offs_row, row_mask, offs_k, C)
            acc = dot(a, load_weight(weight_ptr, offs_n, offs_k, C, C, C), acc, PRECISION)
    else:
        for tap in range(bound(first), bound(last)):
            offs_row = row_offsets(first_token + (tap // R) * width + tap % R, C)
            norm = (norm_weight_ptr, norm_bias_ptr, eps)
            y = norm_rows((x_ptr, 1, 0), offs_row, row_mask, norm, NORM)
            acc = rows_product(acc, y, (weight_ptr + tap * C, R * R * C), offs_n, C, NORM, PRECISION)
    if bias_ptr is not None:
        acc += tl.where(part == 0, load_vector(bias_ptr, offs_n, C), 0.0)[None, :]
    offs_out, part_stride = row_offsets(offs_m, C), row_offsets(rows, C)
    ptrs = partial_ptr + part * part_stride + offs_out[:, None] + offs_n[None, :]
    tl.store(ptrs, acc, mask=row_mask[:, None] & (offs_n < C)[None, :])
    if TO_KV:  # noqa: SIM102  (known when compiled; the other is not)
        if is_last(counter_ptr + tl.program_id(0), tl.num_programs(1) * parts):
            norm = (kv_norm_weight_ptr, kv_norm_bias_ptr, kv_eps)
            source = (partial_ptr, parts, part_stride)
            KV_NORM: tl.constexpr = (C, BLOCK_K, LINEAR, EXACT, dtype, HELD)
            y = norm_rows(source, offs_out, row_mask, norm, KV_NORM)
            for start in range(0, 2 * C, BLOCK_K):
                offs_kv = start + tl.arange(0, BLOCK_K)
                kv = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
                kv = rows_product(kv, y, (kv_weight_ptr, C), offs_kv, 2 * C, KV_NORM, PRECISION)
                if kv_bias_ptr is not None:
                    kv += load_vector(kv_bias_ptr, offs_kv, 2 * C)[None, :]
                kv_ptrs = kv_ptr + row_offsets(offs_m, 2 * C)[:, None] + offs_kv[None, :]
                tl.store(kv_ptrs, round_to(kv, dtype), mask=row_mask[:, None] & (offs_kv < 2 * C)[None, :])


@triton.jit
def adaptive_bin(index, size, BINS: tl.constexpr):
    """First position and length of a bin of adaptive pooling over `size` positions; neighbours may overlap."""
    first = index * size // BINS
    return first, ((index + 1) * size + BINS - 1) // BINS - first


@triton.jit(do_not_specialize=["height", "width"])
def pool_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    height,
    width,
    eps,
    C: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean of LayerNorm(x) over one bin of the BINS x BINS adaptive pooling: one program per image and bin."""
    pid = tl.program_id(0)
    image, bin_row, bin_column = split_index(pid, BINS, BINS)
    first_row, bin_height = adaptive_bin(bin_row, height, BINS)
    first_column, bin_width = adaptive_bin(bin_column, width, BINS)
    count = bin_height * bin_width
    offs_c = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, bound(count), BLOCK_T):
        index = start + tl.arange(0, BLOCK_T)
        token = (image * height + first_row + index // bin_width) * width + first_column + index % bin_width
        x = load_rows(x_ptr, row_offsets(token, C), index < count, offs_c, C).to(tl.float32)
        mean, squares = tile_moments(x, offs_c, C, C)
        rstd = inverse_deviation(squares, C, eps)
        total += tl.sum(tl.where((index < count)[:, None], (x - mean[:, None]) * rstd[:, None], 0.0), 0)
    pooled = total / count * load_vector(norm_weight_ptr, offs_c, C) + load_vector(norm_bias_ptr, offs_c, C)
    ptrs = out_ptr + tl.cast(pid, tl.int64) * C + offs_c
    tl.store(ptrs, round_to(pooled, out_ptr.dtype.element_ty), mask=offs_c < C)


class Reduced(NamedTuple):
    """What attention reads keys and values from."""

    kv: Tensor | None  # (B, keys, 2 C)
    sums: Tensor | None  # without kv: fp32 (parts, B, keys, C), whose sum is the reduced map before its norm


def reduced_keys(hw: HW, spec: AttentionSpec, ratio: int) -> int:
    """Number of keys of a map of H x W tokens."""
    return LINEAR_POOL_SIZE**2 if spec.linear else (hw[0] // ratio) * (hw[1] // ratio)


def reduce_map(
    start: Callable,
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    to_kv: bool,
    products: torch.dtype | None,
) -> Reduced:
    """Keys and values of contiguous tokens x (B, H * W, C), or without `to_kv` the reduced map in parts."""
    assert w.sr is not None
    assert w.sr_norm is not None
    images, _, channels = x.shape
    dtype, chip = products or x.dtype, chip_of(x.device)
    ratio = w.sr.weight.shape[2]
    keys = reduced_keys(hw, spec, ratio)
    sr_weight = w.sr.weight
    weight = packed_off_capture("attention", (sr_weight,), lambda: inputs_last(sr_weight, dtype), products)
    source = x
    if spec.linear:  # to compile, any of its type will do
        source = _pool(x, hw, w.norm, dtype) if start is launch else x.new_empty(x.shape, dtype=dtype)
    size = (LINEAR_POOL_SIZE, LINEAR_POOL_SIZE) if spec.linear else hw
    kv = torch.empty((images, keys, 2 * channels), dtype=dtype, device=x.device) if to_kv else x
    weights = dense(*w.norm[:2], weight, w.sr.bias)
    kv_weights = dense(*w.sr_norm[:2], *in_products(w.kv, products))
    eps = (w.norm.eps, w.sr_norm.eps)
    shape = block_sizes.spatial_reduction(channels, dtype, to_kv, spec.linear, chip)
    tiles = (triton.cdiv(images * keys, shape["BLOCK_M"]), triton.cdiv(channels, shape["BLOCK_N"]))
    parts = block_sizes.parts(tiles[0] * tiles[1], 2 * ratio**2, chip)
    sums, counter = workspace(x.device, parts * images * keys * channels, to_kv * tiles[0])
    start(
        spatial_reduction_kernel,
        (*tiles, parts),
        x,
        *(source, *weights, *kv_weights, sums, counter, kv),
        *(images, *size, parts, *eps),
        C=channels,
        R=ratio,
        LINEAR=spec.linear,
        EXACT=dtype == torch.float32,
        TO_KV=to_kv,
        PRECISION=dot_precision(dtype),
        **shape,
    )
    return Reduced(kv, None) if to_kv else Reduced(None, sums.view(parts, images, keys, channels))


def _pool(x: Tensor, hw: HW, norm: Norm, dtype: torch.dtype) -> Tensor:
    """LayerNorm then adaptive average pooling: (B, 49, C)."""
    images, _, channels = x.shape
    out = torch.empty((images, LINEAR_POOL_SIZE**2, channels), dtype=dtype, device=x.device)
    grid = (images * LINEAR_POOL_SIZE**2,)
    meta = {"C": channels, "BINS": LINEAR_POOL_SIZE, **block_sizes.pool(channels)}
    launch(pool_kernel, grid, x, x, *dense(*norm[:2]), out, *hw, norm.eps, **meta)
    return out
