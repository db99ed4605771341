"""x + proj(attention(LayerNorm(x))): queries of a tile of rows against the keys of the reduced map.

Up to C = 128 `attention_kernel` keeps the projection's sums of whole rows in registers. Wider, `head_attention_kernel`
writes the heads' results and reads them back for the projection, which is another kernel's work where tiles of rows are
few: then each head has a program of its own. Up to 64 keys there is one block of keys and no running maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import HW, AttentionSpec, AttentionWeights, check_attention

from .. import block_sizes
from ..chip import Chip
from ..launch import chip_of, dot_precision, first_time, launch, operands, warm
from ..linear import linear, norm_linear
from ..primitives import (
    add_residual,
    attend,
    attend_block,
    bound,
    dot,
    load_rows,
    load_vector,
    load_weight,
    norm_rows,
    norm_tile,
    round_to,
    row_offsets,
    rows_product,
)
from ..weights import dense, in_products
from .reduction import reduce_map, reduced_keys

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
    META: tl.constexpr = (C, HEAD_DIM, BLOCK_KEYS, ONE_BLOCK, PRECISION)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < tokens
    offs_row = row_offsets(image * tokens + offs_m, C)
    offs_c, offs_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    x = load_rows(x_ptr, offs_row, row_mask, offs_c, C)
    y = round_to(norm_tile(x.to(tl.float32), (norm_weight_ptr, norm_bias_ptr, eps), offs_c, C), dtype)
    kv_image_ptr = kv_ptr + row_offsets(image, keys * (2 * C))
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for head in range(C // HEAD_DIM):
        w = load_weight(q_weight_ptr + head * (HEAD_DIM * C), offs_d, offs_c, C, HEAD_DIM, C)
        q = dot(y, w, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), PRECISION)
        if q_bias_ptr is not None:
            q += head_slice(q_bias_ptr, head, C, HEAD_DIM, BLOCK_D)[None, :]
        z = attend(round_to(q * score_scale, dtype), kv_image_ptr, keys, head * HEAD_DIM, META)
        w = load_weight(proj_weight_ptr + head * HEAD_DIM, offs_c, offs_d, C, C, HEAD_DIM)
        acc = dot(z, w, acc, PRECISION)
    if proj_bias_ptr is not None:
        acc += load_vector(proj_bias_ptr, offs_c, C)[None, :]
    # read again rather than held across the heads
    x = load_rows(x_ptr, offs_row, row_mask, offs_c, C)
    out = add_residual(x, acc, scale_ptr, image + offs_m * 0, row_mask, SCALED)
    ptrs = out_ptr + offs_row[:, None] + offs_c[None, :]
    tl.store(ptrs, round_to(out, x.dtype), mask=row_mask[:, None] & (offs_c < C)[None, :])


@triton.jit
def head_linear(rows, weight_ptr, bias_ptr, head, NORM: tl.constexpr, META: tl.constexpr):
    """One head's columns (M, BLOCK_D) of rows @ weight^T + bias; NORM is META of `norm_rows`.

    META: (HEAD_DIM, BLOCK_M, BLOCK_D, PRECISION).
    """
    C: tl.constexpr = NORM[0]
    HEAD_DIM: tl.constexpr = META[0]
    acc = tl.zeros([META[1], META[2]], tl.float32)
    weight = (weight_ptr + head * (HEAD_DIM * C), C)
    acc = rows_product(acc, rows, weight, tl.arange(0, META[2]), HEAD_DIM, NORM, META[3])
    if bias_ptr is not None:
        acc += head_slice(bias_ptr, head, C, HEAD_DIM, META[2])[None, :]
    return acc


@triton.jit(do_not_specialize=["images", "tokens", "keys", "parts", "heads_per_program", "projects"])
def head_attention_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    q_weight_ptr,
    q_bias_ptr,
    source_ptr,
    kv_norm_weight_ptr,
    kv_norm_bias_ptr,
    kv_weight_ptr,
    kv_bias_ptr,
    heads_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    scale_ptr,
    out_ptr,
    images,
    tokens,
    keys,
    parts,
    heads_per_program,
    projects,
    eps,
    kv_eps,
    score_scale,
    C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SOURCE: tl.constexpr,
    LINEAR: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """Some heads' columns of the attention's output (B, tokens, C) for a tile of one image's queries.

    A program that `projects` has all heads, and goes on to out = x + scale * (that @ Wproj^T + b).
    SOURCE: "kv", keys and values (B, keys, 2 C); "sums", the reduced map in fp32 parts (parts, B, keys, C) of which
    each program makes its heads' keys and values; "self", the same of the queries' own rows, at most BLOCK_M.
    """
    dtype: tl.constexpr = q_weight_ptr.dtype.element_ty
    NORM: tl.constexpr = (C, BLOCK_K, False, False, dtype, HELD)
    KV_NORM: tl.constexpr = (C, BLOCK_K, LINEAR, dtype == tl.float32, dtype, HELD)
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = tl.program_id(0) // tiles
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < tokens
    offs_row = row_offsets(image * tokens + offs_m, C)
    offs_d, offs_key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_KEYS)
    y = norm_rows((x_ptr, 1, 0), offs_row, row_mask, (norm_weight_ptr, norm_bias_ptr, eps), NORM)
    reduced = y
    if SOURCE == "sums":
        offs_reduced = row_offsets(image * keys + offs_key, C)
        source = (source_ptr, parts, row_offsets(images, keys) * C)
        norm = (kv_norm_weight_ptr, kv_norm_bias_ptr, kv_eps)
        reduced = norm_rows(source, offs_reduced, offs_key < keys, norm, KV_NORM)
    first = tl.program_id(1) * heads_per_program
    last = tl.minimum(first + heads_per_program, C // HEAD_DIM)
    for head in range(bound(first), bound(last)):
        q = head_linear(y, q_weight_ptr, q_bias_ptr, head, NORM, (HEAD_DIM, BLOCK_M, BLOCK_D, PRECISION))
        q = round_to(q * score_scale, dtype)
        if SOURCE == "kv":
            META: tl.constexpr = (C, HEAD_DIM, BLOCK_KEYS, ONE_BLOCK, PRECISION)
            z = attend(q, source_ptr + row_offsets(image, keys * (2 * C)), keys, head * HEAD_DIM, META)
        else:
            KV: tl.constexpr = (HEAD_DIM, BLOCK_KEYS, BLOCK_D, PRECISION)
            k = head_linear(reduced, kv_weight_ptr, kv_bias_ptr, head, KV_NORM, KV)
            v = head_linear(reduced, kv_weight_ptr, kv_bias_ptr, C // HEAD_DIM + head, KV_NORM, KV)
            k, v = tl.trans(round_to(k, dtype)), round_to(v, dtype)
            z = attend_block(q, k, v, offs_key < keys, PRECISION)
        ptrs = heads_ptr + offs_row[:, None] + (head * HEAD_DIM + offs_d)[None, :]
        tl.store(ptrs, round_to(z, dtype), mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :])
    if projects != 0:
        tl.debug_barrier()  # the heads that other threads have stored
        offs_k = tl.arange(0, BLOCK_K)
        for start in range(0, C, BLOCK_K):
            offs_n = start + offs_k
            acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for step in range(0, C, BLOCK_K):
                z = load_rows(heads_ptr, offs_row, row_mask, step + offs_k, C)
                w = load_weight(proj_weight_ptr, offs_n, step + offs_k, C, C, C)
                acc = dot(z, w, acc, PRECISION)
            if proj_bias_ptr is not None:
                acc += load_vector(proj_bias_ptr, offs_n, C)[None, :]
            x = load_rows(x_ptr, offs_row, row_mask, offs_n, C)
            out = add_residual(x, acc, scale_ptr, image + offs_m * 0, row_mask, SCALED)
            ptrs = out_ptr + offs_row[:, None] + offs_n[None, :]
            tl.store(ptrs, round_to(out, out_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_n < C)[None, :])


class _Call(NamedTuple):
    """One call's arguments, and its result."""

    x: Tensor
    hw: HW
    w: AttentionWeights
    spec: AttentionSpec
    scale: Tensor | None
    out: Tensor
    products: torch.dtype | None

    @property
    def dtype(self) -> torch.dtype:
        """That of the products."""
        return self.products or self.x.dtype

    @property
    def ratio(self) -> int:
        return 1 if self.w.sr is None else self.w.sr.weight.shape[2]

    @property
    def reduces(self) -> bool:
        return self.w.sr is not None


def attention(
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """See `pvt_fast.ops`."""
    check_attention(x, hw, w, spec, residual_scale, products, plain=True)
    x, residual_scale = operands("attention", x, residual_scale, spec)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    w = w._replace(q=in_products(w.q, products), proj=in_products(w.proj, products))
    call = _Call(x, hw, w, spec, residual_scale, out, products)
    chip = chip_of(x.device)
    one_block = block_sizes.fits_one_block(reduced_keys(hw, spec, call.ratio))
    # the fused kernel goes through a row's heads itself; else few tiles of rows want a program for each head
    rows_only = block_sizes.fuses_projection(x.shape[2], call.dtype, chip)
    many = rows_only or block_sizes.fills(x.shape[0] * triton.cdiv(x.shape[1], block_sizes.QUERIES), chip)
    if first_time(
        ("attention", x.shape[2], spec, call.ratio, call.reduces, x.dtype, call.dtype, residual_scale is None)
    ):
        for form in product((False, True), (many,) if rows_only else (False, True)):
            _attention(warm, call, *form, rows_only, chip)
    _attention(launch, call, one_block, many, rows_only, chip)
    return out


def _attention(start: Callable, call: _Call, one_block: bool, many: bool, rows_only: bool, chip: Chip) -> None:
    """Keys and values of one block or more; many or few tiles of rows."""
    x, w = call.x, call.w
    # few tiles repeat little when each makes its heads' keys and values; with GELU before, registers do not suffice
    own_keys = not (call.reduces and (many or call.spec.linear)) and block_sizes.makes_own_keys(call.dtype, chip)
    in_place = one_block and not rows_only and own_keys
    source: Tensor | None = x
    if call.reduces:
        reduced = reduce_map(start, x, call.hw, w, call.spec, not in_place, call.products)
        source = reduced.sums if in_place else reduced.kv
    elif not in_place:
        source = norm_linear(start, x, w.norm, in_products(w.kv, call.products))
    assert source is not None
    if rows_only:
        _fused(start, call, source, one_block, chip)
        return
    kind = "kv" if not in_place else "sums" if call.reduces else "self"
    heads = _heads(start, call, source, kind, one_block, many, chip)
    if not many:
        linear(start, heads, w.proj, call.out, x, call.scale)


def _fused(start: Callable, call: _Call, kv: Tensor, one_block: bool, chip: Chip) -> None:
    """Queries, attention of all heads and the projection, its sums kept in registers."""
    x, w = call.x, call.w
    channels, tokens = x.shape[2], x.shape[1]
    head_dim = channels // call.spec.num_heads
    pointers = (x, *dense(*w.norm[:2], *w.q), kv)
    shape = block_sizes.attention(channels, head_dim, one_block, call.dtype, chip)
    start(
        attention_kernel,
        (x.shape[0] * triton.cdiv(tokens, shape["BLOCK_M"]),),
        x,
        *(*pointers, *dense(*w.proj), call.scale, call.out),
        *(tokens, kv.shape[1], w.norm.eps, call.spec.scale * _LOG2_E),
        C=channels,
        HEAD_DIM=head_dim,
        SCALED=call.scale is not None,
        PRECISION=dot_precision(call.dtype),
        **shape,
    )


def _heads(start: Callable, call: _Call, source: Tensor, kind: str, one_block: bool, many: bool, chip: Chip) -> Tensor:
    """The attention's output before the projection, (B, N, C); with `many` tiles the projection too."""
    x, w = call.x, call.w
    images, tokens, channels = x.shape
    head_dim = channels // call.spec.num_heads
    heads = torch.empty(x.shape, dtype=call.dtype, device=x.device)
    kv_norm = w.norm if w.sr_norm is None else w.sr_norm
    per_program = call.spec.num_heads if many else 1
    queries = (x, *dense(*w.norm[:2], *w.q))
    keys = (source, *dense(*kv_norm[:2], *in_products(w.kv, call.products)))
    parts = source.shape[0] if kind == "sums" else 1
    shape = block_sizes.attention(channels, head_dim, one_block, call.dtype, chip)
    start(
        head_attention_kernel,
        (images * triton.cdiv(tokens, shape["BLOCK_M"]), triton.cdiv(call.spec.num_heads, per_program)),
        x,
        *(*queries, *keys, heads, *dense(*w.proj), call.scale, call.out),
        *(images, tokens, source.shape[-2], parts, per_program, int(many)),
        *(w.norm.eps, kv_norm.eps, call.spec.scale * _LOG2_E),
        C=channels,
        HEAD_DIM=head_dim,
        SOURCE=kind,
        LINEAR=call.spec.linear,
        SCALED=call.scale is not None,
        PRECISION=dot_precision(call.dtype),
        **shape,
    )
    return heads
