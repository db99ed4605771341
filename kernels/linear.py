"""Linear layers over rows: plain with an epilogue, and behind a LayerNorm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import Linear, Norm

from . import config
from .launch import chip_of, dot_precision, launch
from .primitives import (
    add_residual,
    dot,
    load_rows,
    load_vector,
    load_weight,
    norm_linear,
    round_to,
    row_offsets,
    row_statistics,
)


@triton.jit(do_not_specialize=["rows", "rows_per_image"])
def linear_kernel(
    a_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    scale_ptr,
    out_ptr,
    rows,
    rows_per_image,
    N: tl.constexpr,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[x + scale *] (a @ W^T + b) for a tile of rows and columns; a (rows, A_STRIDE), of which K columns count."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_m < rows
    offs_row = row_offsets(offs_m, A_STRIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a = load_rows(a_ptr, offs_row, row_mask, offs_k, K)
        w = load_weight(weight_ptr, offs_n, offs_k, K, N, K)
        acc = dot(a, w, acc, PRECISION)
    if bias_ptr is not None:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    offs_out = row_offsets(offs_m, N)
    if RESIDUAL:
        x = load_rows(x_ptr, offs_out, row_mask, offs_n, N)
        acc = add_residual(x, acc, scale_ptr, offs_m // rows_per_image, row_mask, SCALED)
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    ptrs = out_ptr + offs_out[:, None] + offs_n[None, :]
    tl.store(ptrs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "parts"])
def norm_linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    parts,
    eps,
    N: tl.constexpr,
    C: tl.constexpr,
    SUMMED: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[gelu](LayerNorm(x)) @ W^T + b for a tile of rows and columns; SUMMED: x is the sum of (parts, rows, C)."""
    META: tl.constexpr = (N, C, BLOCK_K, GELU, EXACT, PRECISION)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_m < rows
    offs_row = row_offsets(offs_m, C)
    norm = (norm_weight_ptr, norm_bias_ptr, eps)
    source = (x_ptr, parts, row_offsets(rows, C)) if SUMMED else (x_ptr, 1, 0)
    statistics = row_statistics(source, offs_row, row_mask, eps, C, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = norm_linear(acc, source, offs_row, row_mask, statistics, norm, (weight_ptr, C), offs_n, META)
    if bias_ptr is not None:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    ptrs = out_ptr + row_offsets(offs_m, N)[:, None] + offs_n[None, :]
    tl.store(ptrs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


def linear(a: Tensor, w: Linear, out: Tensor, x: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """out = a @ W^T + b, or x + scale * that with one scale per image; a (B, N, >= Cin), out (B, N, Cout)."""
    columns, inner = w.weight.shape[:2]
    shape = config.linear(columns, inner, a.dtype, chip_of(a.device).shared)
    rows = a.shape[0] * a.shape[1]
    grid = (triton.cdiv(rows, shape["BLOCK_M"]), triton.cdiv(columns, shape["BLOCK_N"]))
    meta = {"N": columns, "K": inner, "A_STRIDE": a.shape[2], "PRECISION": dot_precision(a.dtype), **shape}
    meta |= {"RESIDUAL": x is not None, "SCALED": scale is not None}
    launch(linear_kernel, grid, a, a, w.weight.contiguous(), w.bias, x, scale, out, rows, a.shape[1], **meta)
    return out


def norm_linear_rows(x: Tensor, norm: Norm, w: Linear, gelu: bool) -> Tensor:
    """[gelu](LayerNorm(x)) @ W^T + b in the weights' dtype; x (B, M, C), or fp32 (parts, B, M, C) to be summed."""
    dtype = w.weight.dtype
    columns, channels = w.weight.shape
    images, rows_per_image = x.shape[-3:-1]
    rows = images * rows_per_image
    out = torch.empty((images, rows_per_image, columns), dtype=dtype, device=x.device)
    summed = x.dim() == 4
    shape = config.norm_linear(channels, columns, dtype, chip_of(x.device).shared, summed)
    grid = (triton.cdiv(rows, shape["BLOCK_M"]), triton.cdiv(columns, shape["BLOCK_N"]))
    pointers = (x, norm.weight, norm.bias, w.weight.contiguous(), w.bias, out)
    meta = {"N": columns, "C": channels, "SUMMED": summed, "GELU": gelu, "EXACT": dtype == torch.float32, **shape}
    numbers = (rows, x.shape[0] if summed else 1, norm.eps)
    launch(norm_linear_kernel, grid, x, *pointers, *numbers, PRECISION=dot_precision(dtype), **meta)
    return out
