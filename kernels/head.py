"""LayerNorm over rows, and the mean over tokens before the classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import Linear, Norm, check_head, check_layer_norm, result_dtype

from . import block_sizes
from .launch import launch, operands
from .primitives import bound, load_rows, norm_tile, round_to, row_offsets
from .weights import dense, in_products


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, eps, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """LayerNorm of BLOCK_M whole rows."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    row_mask = offs_m < rows
    offs_row = row_offsets(offs_m, C)
    x = load_rows(x_ptr, offs_row, row_mask, offs_c, C)
    y = norm_tile(x.to(tl.float32), (weight_ptr, bias_ptr, eps), offs_c, C)
    ptrs = out_ptr + offs_row[:, None] + offs_c[None, :]
    tl.store(ptrs, round_to(y, x.dtype), mask=row_mask[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def token_mean_kernel(x_ptr, out_ptr, tokens, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean over the tokens of one image, for BLOCK_C channels: x (B, tokens, C) -> (B, C)."""
    image = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, bound(tokens), BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        offs_row = row_offsets(image * tokens + offs_t, C)
        total += tl.sum(load_rows(x_ptr, offs_row, offs_t < tokens, offs_c, C).to(tl.float32), 0)
    mean = round_to(total / tokens, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.cast(image, tl.int64) * C + offs_c, mean, mask=offs_c < C)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """See `pvt_fast.ops`."""
    check_layer_norm(x, w, plain=True)
    x, _ = operands("layer_norm", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        channels = x.shape[-1]
        rows = x.numel() // channels
        shape = block_sizes.rows(channels)
        grid = (triton.cdiv(rows, shape["BLOCK_M"]),)
        launch(layer_norm_kernel, grid, x, x, *dense(*w[:2]), out, rows, w.eps, C=channels, **shape)
    return out


def head(x: Tensor, w: Linear | None, products: torch.dtype | None = None) -> Tensor:
    """See `pvt_fast.ops`. The classifier is torch's: one product of (B, C) by (C, num_classes)."""
    check_head(x, w, products, plain=True)
    x, _ = operands("head", x)
    images, tokens, channels = x.shape
    dtype = result_dtype("head", x.device.type, x.dtype, products, classifies=w is not None)
    mean = torch.empty((images, channels), dtype=dtype, device=x.device)
    if mean.numel():
        shape = block_sizes.token_mean(channels)
        grid = (images, triton.cdiv(channels, shape["BLOCK_C"]))
        launch(token_mean_kernel, grid, x, x, mean, tokens, C=channels, **shape)
    if w is None:
        return mean
    weight, bias = in_products(w, products)
    return F.linear(mean, weight, None if bias is None else bias.to(dtype))
