"""Linear layers over rows: before a residual, and behind a LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import Linear, Norm

from . import block_sizes
from .launch import chip_of, dot_precision
from .primitives import (
    add_residual,
    bound,
    dot,
    load_rows,
    load_vector,
    load_weight,
    norm_rows,
    round_to,
    row_offsets,
    rows_product,
)
from .weights import dense


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
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x + [scale *] (a @ W^T + b) for a tile of rows and columns; a (rows, K), x (rows, N)."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_m < rows
    offs_row = row_offsets(offs_m, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a = load_rows(a_ptr, offs_row, row_mask, offs_k, K)
        w = load_weight(weight_ptr, offs_n, offs_k, K, N, K)
        acc = dot(a, w, acc, PRECISION)
    if bias_ptr is not None:
        acc += load_vector(bias_ptr, offs_n, N)[None, :]
    offs_out = row_offsets(offs_m, N)
    x = load_rows(x_ptr, offs_out, row_mask, offs_n, N)
    acc = add_residual(x, acc, scale_ptr, offs_m // rows_per_image, row_mask, SCALED)
    mask = row_mask[:, None] & (offs_n < N)[None, :]
    ptrs = out_ptr + offs_out[:, None] + offs_n[None, :]
    tl.store(ptrs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "column_blocks"])
def norm_linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    column_blocks,
    eps,
    N: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
):
    """LayerNorm(x) @ W^T + b for a tile of rows and `column_blocks` blocks of columns."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < rows
    norm = (norm_weight_ptr, norm_bias_ptr, eps)
    NORM: tl.constexpr = (C, BLOCK_K, False, False, weight_ptr.dtype.element_ty, HELD)
    y = norm_rows((x_ptr, 1, 0), row_offsets(offs_m, C), row_mask, norm, NORM)
    first = tl.program_id(1) * column_blocks * BLOCK_N
    last = tl.minimum(first + column_blocks * BLOCK_N, N)
    for start in range(bound(first), bound(last), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = rows_product(acc, y, (weight_ptr, C), offs_n, N, NORM, PRECISION)
        if bias_ptr is not None:
            acc += load_vector(bias_ptr, offs_n, N)[None, :]
        ptrs = out_ptr + row_offsets(offs_m, N)[:, None] + offs_n[None, :]
        tl.store(ptrs, round_to(acc, out_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_n < N)[None, :])


def linear(start: Callable, a: Tensor, w: Linear, out: Tensor, x: Tensor, scale: Tensor | None) -> None:
    """out = x + a @ W^T + b, or x + scale * (...) with one scale per image; a (B, N, Cin), x and out (B, N, Cout)."""
    columns, inner = w.weight.shape
    rows = a.shape[0] * a.shape[1]
    pointers = (a, *dense(*w), x, scale, out)
    meta = {"N": columns, "K": inner, "SCALED": scale is not None, "PRECISION": dot_precision(a.dtype)}
    shape = block_sizes.linear(columns, inner, a.dtype, chip_of(a.device))
    grid = (triton.cdiv(rows, shape["BLOCK_M"]), triton.cdiv(columns, shape["BLOCK_N"]))
    start(linear_kernel, grid, a, *pointers, rows, a.shape[1], **meta, **shape)


def norm_linear(start: Callable, x: Tensor, norm: Norm, w: Linear) -> Tensor:
    """LayerNorm(x) @ W^T + b, in the weight's dtype; x (B, N, C)."""
    columns, channels = w.weight.shape
    rows = x.shape[0] * x.shape[1]
    dtype = w.weight.dtype
    out = torch.empty((*x.shape[:2], columns), dtype=dtype, device=x.device)
    chip = chip_of(x.device)
    pointers = (x, *dense(*norm[:2], *w), out)
    meta = {"N": columns, "C": channels, "PRECISION": dot_precision(dtype)}
    shape = block_sizes.norm_linear(channels, columns, dtype, chip)
    tiles, blocks = triton.cdiv(rows, shape["BLOCK_M"]), triton.cdiv(columns, shape["BLOCK_N"])
    per_program = block_sizes.columns_per_program(tiles, blocks, chip)
    grid = (tiles, triton.cdiv(blocks, per_program))
    start(norm_linear_kernel, grid, x, *pointers, rows, per_program, norm.eps, **meta, **shape)
    return out
