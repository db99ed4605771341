"""LayerNorm(conv(image)) as an implicit GEMM: tokens x (taps * channels), read from the image's own strides.

For C <= 128 a program owns whole rows and normalises them itself. Wider, programs leave fp32 sums of their columns, and
of their part of the taps where tiles are few, and the last of a tile of rows adds up and normalises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import HW, PatchEmbedWeights, check_patch_embed, result_dtype

from . import block_sizes
from .launch import chip_of, dot_precision, launch, require_runs
from .primitives import (
    bound,
    dot,
    is_last,
    load_sum,
    load_vector,
    load_weight,
    norm_tile,
    round_to,
    row_offsets,
    split_index,
)
from .weights import dense, in_products, inputs_last, packed_off_capture
from .workspace import workspace

_SIZES = ["images", "height", "width", "out_height", "out_width", "parts"]


@triton.jit
def image_tile(ptr, offs_image, row, column, strides, size, k, row_mask, META: tl.constexpr):
    """The tile (M, K) of the unfolded image at GEMM columns k, its padding 0. row, column: top left tap, may be < 0.

    META: (CIN, KERNEL, PER_TAP). PER_TAP: k = (tap, channel) and all of a block lies in one tap; else
    k = (channel, tap).
    """
    CIN: tl.constexpr = META[0]
    KERNEL: tl.constexpr = META[1]
    if META[2]:
        tap, channel = k[0], k[1]
        r, c = row + tap // KERNEL, column + tap % KERNEL
        inside = row_mask & (r >= 0) & (r < size[0]) & (c >= 0) & (c < size[1])
        offs = offs_image + r.to(tl.int64) * strides[1] + c.to(tl.int64) * strides[2]
        mask = inside[:, None] & (channel < CIN)[None, :]
        return tl.load(ptr + offs[:, None] + (channel.to(tl.int64) * strides[0])[None, :], mask=mask, other=0.0)
    else:
        channel, tap = k // (KERNEL * KERNEL), k % (KERNEL * KERNEL)
        r, c = row[:, None] + (tap // KERNEL)[None, :], column[:, None] + (tap % KERNEL)[None, :]
        inside = row_mask[:, None] & (r >= 0) & (r < size[0]) & (c >= 0) & (c < size[1]) & (channel < CIN)[None, :]
        offs = r.to(tl.int64) * strides[1] + c.to(tl.int64) * strides[2] + (channel.to(tl.int64) * strides[0])[None, :]
        return tl.load(ptr + offs_image[:, None] + offs, mask=inside, other=0.0)


@triton.jit
def normalize_sums(partial_ptr, parts, bias_ptr, norm, out_ptr, first, rows, META: tl.constexpr):
    """LayerNorm of the sum of partial (parts, rows, C) and a bias, for some rows from `first` on.

    META: (C, BLOCK_C, BLOCK_ROWS).
    """
    C: tl.constexpr = META[0]
    offs_c = tl.arange(0, META[1])
    offs_m = first + tl.arange(0, META[2])
    row_mask = offs_m < rows
    offs_row = row_offsets(offs_m, C)
    total = load_sum(partial_ptr, offs_row, row_mask, offs_c, parts, row_offsets(rows, C), C)
    if bias_ptr is not None:
        total += load_vector(bias_ptr, offs_c, C)[None, :]
    y = round_to(norm_tile(total, norm, offs_c, C), out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_row[:, None] + offs_c[None, :]
    tl.store(ptrs, y, mask=row_mask[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def patch_embed_kernel(
    image_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    partial_ptr,
    counter_ptr,
    out_ptr,
    images,
    height,
    width,
    out_height,
    out_width,
    parts,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    eps,
    CIN: tl.constexpr,
    C: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_TAP: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """LayerNorm(conv(image) + b) for a tile of tokens; weight (C, K * K, CIN) if PER_TAP.

    Without WHOLE_ROWS a program has some columns and one of `parts` parts of the taps, and the last one of the tile
    normalises the sums, BLOCK_ROWS rows at a time.
    """
    META: tl.constexpr = (CIN, KERNEL, PER_TAP)
    K: tl.constexpr = CIN * KERNEL * KERNEL
    STEPS_PER_TAP: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = KERNEL * KERNEL * STEPS_PER_TAP if PER_TAP else (K + BLOCK_K - 1) // BLOCK_K
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row_mask = offs_m < images * out_height * out_width
    batch, row, column = split_index(offs_m, out_height, out_width)
    row, column = row * STRIDE - KERNEL // 2, column * STRIDE - KERNEL // 2
    offs_image = row_offsets(batch, image_stride)
    strides, size = (channel_stride, row_stride, column_stride), (height, width)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part = tl.program_id(2)
    for step in range(bound(STEPS * part // parts), bound(STEPS * (part + 1) // parts)):
        if PER_TAP:
            tap = step // STEPS_PER_TAP
            channel = (step % STEPS_PER_TAP) * BLOCK_K + offs_k
            a = image_tile(image_ptr, offs_image, row, column, strides, size, (tap, channel), row_mask, META)
            w = load_weight(weight_ptr + tap * CIN, offs_n, channel, K, C, CIN)
        else:
            k = step * BLOCK_K + offs_k
            a = image_tile(image_ptr, offs_image, row, column, strides, size, k, row_mask, META)
            w = load_weight(weight_ptr, offs_n, k, K, C, K)
        acc = dot(a, w, acc, PRECISION)
    norm = (norm_weight_ptr, norm_bias_ptr, eps)
    if WHOLE_ROWS:
        if bias_ptr is not None:
            acc += load_vector(bias_ptr, offs_n, C)[None, :]
        y = round_to(norm_tile(acc, norm, offs_n, C), out_ptr.dtype.element_ty)
        ptrs = out_ptr + row_offsets(offs_m, C)[:, None] + offs_n[None, :]
        tl.store(ptrs, y, mask=row_mask[:, None] & (offs_n < C)[None, :])
    else:
        rows = images * out_height * out_width
        part_stride = row_offsets(rows, C)
        ptrs = partial_ptr + part * part_stride + row_offsets(offs_m, C)[:, None] + offs_n[None, :]
        tl.store(ptrs, acc, mask=row_mask[:, None] & (offs_n < C)[None, :])
        if is_last(counter_ptr + tl.program_id(0), tl.num_programs(1) * parts):
            for start in range(0, BLOCK_M, BLOCK_ROWS):
                first = tl.program_id(0) * BLOCK_M + start
                normalize_sums(partial_ptr, parts, bias_ptr, norm, out_ptr, first, rows, (C, BLOCK_C, BLOCK_ROWS))


# For single pixels (without PER_TAP), whose loads are narrow: an image of odd size or another layout compiles nothing.
pixel_embed_kernel = triton.jit(
    patch_embed_kernel.fn, do_not_specialize=[*_SIZES, "image_stride", "channel_stride", "row_stride", "column_stride"]
)


def patch_embed(
    image: Tensor, w: PatchEmbedWeights, stride: int, products: torch.dtype | None = None
) -> tuple[Tensor, HW]:
    """See `pvt_fast.ops`."""
    hw = check_patch_embed(image, w, stride, products, plain=True)
    require_runs("patch_embed", image)
    dtype = result_dtype("patch_embed", image.device.type, image.dtype, products)
    image = image.resolve_neg().to(products or image.dtype)
    images, in_channels = image.shape[:2]
    channels, _, kernel, _ = w.proj.weight.shape
    out = torch.empty((images, hw[0] * hw[1], channels), dtype=dtype, device=image.device)
    if out.numel() == 0:
        return out, hw
    chip = chip_of(image.device)
    shape = block_sizes.patch_embed(in_channels, channels, image.dtype, chip)
    weight = w.proj.weight
    if shape["PER_TAP"]:
        weight = packed_off_capture("patch_embed", (weight,), lambda: inputs_last(w.proj.weight, image.dtype), products)
    else:
        weight = in_products(w.proj, products).weight
    pointers = (image, *dense(weight, w.proj.bias, *w.norm[:2]))
    summed = not shape["WHOLE_ROWS"]
    tiles = (triton.cdiv(images * hw[0] * hw[1], shape["BLOCK_M"]), triton.cdiv(channels, shape["BLOCK_N"]))
    steps = kernel * kernel * in_channels // shape["BLOCK_K"]
    parts = block_sizes.parts(tiles[0] * tiles[1], steps, chip) if summed else 1
    partial, counter = workspace(image.device, summed * parts * out.numel(), summed * tiles[0])
    launch(
        patch_embed_kernel if shape["PER_TAP"] else pixel_embed_kernel,
        (*tiles, parts),
        image,
        *(*pointers, partial, counter, out),
        *(images, *image.shape[2:], *hw, parts, *image.stride(), w.norm.eps),
        CIN=in_channels,
        C=channels,
        KERNEL=kernel,
        STRIDE=stride,
        PRECISION=dot_precision(image.dtype),
        **shape,
    )
    return out, hw
