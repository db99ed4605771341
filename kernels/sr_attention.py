"""x + proj(softmax(q k^T * scale) v): queries and scores never reach memory.

K and V come from `spatial_reduction`. For C <= 128 (64 in fp32 and on AMD) `attention_kernel` does the rest in one
launch; wider, one program per head (`head_attention_kernel`) writes its share of the attention's output and
`linear_kernel` projects it (see config.ROW_LIMIT and config.fuses_projection).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import HW, AttentionSpec, AttentionWeights, check_attention

from . import config
from .launch import chip_of, dot_precision, launch
from .linear import linear
from .primitives import (
    add_residual,
    attend,
    dot,
    load_rows,
    load_vector,
    load_weight,
    norm_linear,
    norm_tile,
    round_to,
    row_offsets,
    row_statistics,
)
from .spatial_reduction import keys_and_values

_LOG2_E = 1.4426950408889634


@triton.jit
def head_slice(ptr, head, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's part of a vector of all heads, fp32; 0 past the head."""
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + head * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "keys"])
def attention_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    q_bias_ptr,
    kv_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    keys,
    eps,
    score_scale,
    C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """x + scale * (attention of all heads @ Wproj^T + b) for a tile of one image's queries."""
    META: tl.constexpr = (C, HEAD_DIM, BLOCK_D, BLOCK_KEYS, ONE_BLOCK, PRECISION)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < tokens
    offs_row = row_offsets(image * tokens + offs_m, C)
    offs_c, offs_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    x = load_rows(x_ptr, offs_row, row_mask, offs_c, C)
    y = round_to(norm_tile(x.to(tl.float32), (norm_weight_ptr, norm_bias_ptr, eps), offs_c, C), x.dtype)
    kv_image_ptr = kv_ptr + row_offsets(image, keys * (2 * C))
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for head in range(C // HEAD_DIM):
        w = load_weight(q_weight_ptr + head * (HEAD_DIM * C), offs_d, offs_c, C, HEAD_DIM, C)
        q = dot(y, w, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
        if q_bias_ptr is not None:
            q += head_slice(q_bias_ptr, head, C, HEAD_DIM, BLOCK_D)[None, :]
        z = attend(round_to(q * score_scale, x.dtype), kv_image_ptr, keys, head * HEAD_DIM, META)
        w = load_weight(proj_weight_ptr + head * HEAD_DIM, offs_c, offs_d, C, C, HEAD_DIM)
        acc = dot(z, w, acc, PRECISION)
    if proj_bias_ptr is not None:
        acc += load_vector(proj_bias_ptr, offs_c, C)[None, :]
    # read again rather than held across the heads
    x = load_rows(x_ptr, offs_row, row_mask, offs_c, C)
    out = add_residual(x, acc, scale_ptr, image + offs_m * 0, row_mask, SCALED)
    ptrs = out_ptr + offs_row[:, None] + offs_c[None, :]
    tl.store(ptrs, round_to(out, x.dtype), mask=row_mask[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=["tokens", "keys"])
def head_attention_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    q_bias_ptr,
    kv_ptr,
    out_ptr,
    tokens,
    keys,
    eps,
    score_scale,
    C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """One head's columns of the attention's output (B, tokens, C) for a tile of one image's queries."""
    META: tl.constexpr = (C, HEAD_DIM, BLOCK_D, BLOCK_KEYS, ONE_BLOCK, PRECISION)
    Q_META: tl.constexpr = (HEAD_DIM, C, BLOCK_K, False, False, PRECISION)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    head = tl.program_id(1)
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < tokens
    offs_row = row_offsets(image * tokens + offs_m, C)
    offs_d = tl.arange(0, BLOCK_D)
    source, norm = (x_ptr, 1, 0), (norm_weight_ptr, norm_bias_ptr, eps)
    statistics = row_statistics(source, offs_row, row_mask, eps, C, BLOCK_K)
    weight = (q_weight_ptr + head * (HEAD_DIM * C), C)
    q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    q = norm_linear(q, source, offs_row, row_mask, statistics, norm, weight, offs_d, Q_META)
    if q_bias_ptr is not None:
        q += head_slice(q_bias_ptr, head, C, HEAD_DIM, BLOCK_D)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    kv_image_ptr = kv_ptr + row_offsets(image, keys * (2 * C))
    z = attend(round_to(q * score_scale, dtype), kv_image_ptr, keys, head * HEAD_DIM, META)
    ptrs = out_ptr + offs_row[:, None] + (head * HEAD_DIM + offs_d)[None, :]
    tl.store(ptrs, round_to(z, dtype), mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :])


def sr_attention(
    x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None = None
) -> Tensor:
    """See `pvt_fast.ops`."""
    check_attention(x, hw, w, spec, residual_scale)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    images, tokens, channels = x.shape
    head_dim = channels // spec.num_heads
    kv = keys_and_values(x, hw, w, spec)
    shared = chip_of(x.device).shared
    shape = config.attention(channels, head_dim, kv.shape[1], x.dtype, shared)
    queries = (x, w.norm.weight, w.norm.bias, w.q.weight.contiguous(), w.q.bias, kv)
    numbers = (tokens, kv.shape[1], w.norm.eps, spec.scale * _LOG2_E)
    meta = {"C": channels, "HEAD_DIM": head_dim, "PRECISION": dot_precision(x.dtype), **shape}
    tiles = images * triton.cdiv(tokens, shape["BLOCK_M"])
    if config.fuses_projection(channels, x.dtype, shared):
        projection = (w.proj.weight.contiguous(), w.proj.bias, residual_scale, out)
        meta |= {"SCALED": residual_scale is not None}
        launch(attention_kernel, (tiles,), x, *queries, *projection, *numbers, **meta)
        return out
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(head_attention_kernel, (tiles, spec.num_heads), x, *queries, z, *numbers, **meta)
    return linear(z, w.proj, out, x, residual_scale)
