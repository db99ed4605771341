"""The reduced map that gives K and V, and K and V themselves.

R > 1: `spatial_reduction_kernel` convolves LayerNorm(x) as one product per tap over strided rows, split over taps into
fp32 parts (a kernel of its own because its sum is R * R * C long over few rows: see config.reduction_splits), and
`norm_linear_kernel` adds the parts, normalises and multiplies by Wkv. Linear form: `pool_kernel`, then the 1x1
convolution, then the same. R = 1: `norm_linear_kernel` alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.config import LINEAR_POOL_SIZE
from pvt_fast.ops import HW, AttentionSpec, AttentionWeights, Linear, Norm
from pvt_fast.prepack import packed

from . import config
from .launch import chip_of, dot_precision, launch
from .linear import linear, norm_linear_rows
from .primitives import (
    bound,
    load_rows,
    load_vector,
    norm_linear,
    round_to,
    row_offsets,
    row_statistics,
    split_index,
    tile_moments,
)


@triton.jit(do_not_specialize=["images", "height", "width", "taps_per_part"])
def spatial_reduction_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    images,
    height,
    width,
    taps_per_part,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Part of conv_RxR(LayerNorm(x)) over some taps, fp32 (parts, rows, C); weight (C, R * R, C), inputs last."""
    META: tl.constexpr = (C, C, BLOCK_K, False, False, PRECISION)
    part = tl.program_id(2)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    reduced_height, reduced_width = height // R, width // R
    rows = images * reduced_height * reduced_width
    row_mask = offs_m < rows
    image, row, column = split_index(offs_m, reduced_height, reduced_width)
    first_token = (image * height + row * R) * width + column * R
    source, norm = (x_ptr, 1, 0), (norm_weight_ptr, norm_bias_ptr, eps)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum((part + 1) * taps_per_part, R * R)
    for tap in range(bound(part * taps_per_part), bound(last)):
        offs_row = row_offsets(first_token + (tap // R) * width + tap % R, C)
        statistics = row_statistics(source, offs_row, row_mask, eps, C, BLOCK_K)
        weight = (weight_ptr + tap * C, R * R * C)
        acc = norm_linear(acc, source, offs_row, row_mask, statistics, norm, weight, offs_n, META)
    if bias_ptr is not None and part == 0:
        acc += load_vector(bias_ptr, offs_n, C)[None, :]
    offs_out = row_offsets(tl.cast(part, tl.int64) * rows + offs_m, C)
    tl.store(out_ptr + offs_out[:, None] + offs_n[None, :], acc, mask=row_mask[:, None] & (offs_n < C)[None, :])


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
        rstd = tl.rsqrt(squares / C + eps)
        total += tl.sum(tl.where((index < count)[:, None], (x - mean[:, None]) * rstd[:, None], 0.0), 0)
    pooled = total / count * load_vector(norm_weight_ptr, offs_c, C) + load_vector(norm_bias_ptr, offs_c, C)
    ptrs = out_ptr + tl.cast(pid, tl.int64) * C + offs_c
    tl.store(ptrs, round_to(pooled, out_ptr.dtype.element_ty), mask=offs_c < C)


def keys_and_values(x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec) -> Tensor:
    """kv (B, keys, 2 C) of contiguous tokens x (B, H * W, C)."""
    if w.sr is None or w.sr_norm is None:
        return norm_linear_rows(x, w.norm, w.kv, gelu=False)
    if spec.linear:
        reduced = torch.empty((x.shape[0], LINEAR_POOL_SIZE**2, x.shape[2]), dtype=torch.float32, device=x.device)
        linear(_pool(x, hw, w.norm), w.sr, reduced)
    else:
        reduced = _reduce(x, hw, w, w.sr)
    return norm_linear_rows(reduced, w.sr_norm, w.kv, gelu=spec.linear)


def _reduce(x: Tensor, hw: HW, w: AttentionWeights, sr: Linear) -> Tensor:
    """Parts of the reduced map, fp32 (parts, B, keys, C)."""
    images, _, channels = x.shape
    ratio = sr.weight.shape[2]
    keys = (hw[0] // ratio) * (hw[1] // ratio)
    weight = packed(w.cache, "triton", (sr.weight,), lambda: sr.weight.detach().permute(0, 2, 3, 1).contiguous())
    shape = config.spatial_reduction(channels, x.dtype, chip_of(x.device).shared)
    tiles = (triton.cdiv(images * keys, shape["BLOCK_M"]), triton.cdiv(channels, shape["BLOCK_N"]))
    parts = config.reduction_splits(tiles[0] * tiles[1], ratio**2)
    out = torch.empty((parts, images, keys, channels), dtype=torch.float32, device=x.device)
    pointers = (x, w.norm.weight, w.norm.bias, weight, sr.bias, out)
    numbers = (images, *hw, triton.cdiv(ratio**2, parts), w.norm.eps)
    meta = {"C": channels, "R": ratio, "PRECISION": dot_precision(x.dtype), **shape}
    launch(spatial_reduction_kernel, (*tiles, parts), x, *pointers, *numbers, **meta)
    return out


def _pool(x: Tensor, hw: HW, norm: Norm) -> Tensor:
    """LayerNorm then adaptive average pooling: (B, 49, C)."""
    images, _, channels = x.shape
    out = torch.empty((images, LINEAR_POOL_SIZE**2, channels), dtype=x.dtype, device=x.device)
    grid = (images * LINEAR_POOL_SIZE**2,)
    meta = {"C": channels, "BINS": LINEAR_POOL_SIZE, **config.pool(channels)}
    launch(pool_kernel, grid, x, x, norm.weight, norm.bias, out, *hw, norm.eps, **meta)
    return out
