"""x + fc2(gelu(dwconv3x3(h))), h = fc1(LayerNorm(x)) or relu of it: the hidden map crosses memory twice.

`norm_fc1_kernel` writes h into a map with a border of zeros, one pixel on each side, so that the convolution's
padding is data and its loads need no masks. Rows are padded to whole groups of ROWS. Then, for C <= 128,
`dwconv_fc2_kernel` does all the rest; wider, `dwconv_gelu_kernel` and `linear.linear_kernel` (see config.ROW_LIMIT).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import HW, MlpSpec, MlpWeights, check_mlp
from pvt_fast.prepack import packed

from . import config
from .launch import chip_of, dot_precision, launch
from .linear import linear
from .primitives import (
    add_residual,
    bound,
    depthwise_rows,
    dot,
    gelu,
    load_rows,
    load_vector,
    norm_linear,
    round_to,
    row_offsets,
    row_statistics,
    split_index,
)

# Column blocks that one program of norm_fc1 goes through, so that a row's statistics are computed once for all.
_COLUMN_BLOCKS = 4


class _Packed(NamedTuple):
    """Weights with the hidden dimension padded by zeros to whole blocks."""

    fc1: Tensor  # (HID, C)
    fc1_bias: Tensor  # (HID,)
    taps: Tensor  # (9, HID) fp32
    taps_bias: Tensor  # (HID,) fp32
    fc2_t: Tensor | None  # (HID, C), the transpose; None where fc2 is a kernel of its own


@triton.jit
def zero_border(
    hidden_ptr, tile, offs_n, images, height, width, padded_height, HID: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Zero the `tile`-th BLOCK_M pixels of the bordered map (images, padded_height, width + 2, HID) that hold no token.

    Of each image these are the first row, the rows from height + 1 on, and both ends of the rows between.
    """
    columns = width + 2
    last_rows = (padded_height - height - 1) * columns
    count = columns + last_rows + 2 * height
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image, rest = index // count, index % count
    side = rest - columns - last_rows
    pixel = tl.where(rest < columns, rest, (height + 1) * columns + rest - columns)
    pixel = tl.where(side >= 0, (side // 2 + 1) * columns + (side % 2) * (columns - 1), pixel)
    offs = row_offsets(image, padded_height * columns) + pixel
    mask = (image < images)[:, None] & (offs_n < HID)[None, :]
    zeros = tl.zeros([BLOCK_M, offs_n.shape[0]], hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row_offsets(offs, HID)[:, None] + offs_n[None, :], zeros, mask=mask)


@triton.jit(do_not_specialize=["images", "height", "width", "padded_height", "column_blocks"])
def norm_fc1_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    images,
    height,
    width,
    padded_height,
    column_blocks,
    eps,
    C: tl.constexpr,
    HID: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h = [relu](LayerNorm(x) @ W1^T + b1) for a tile of tokens; the programs after the last tile zero the border."""
    tile = tl.program_id(0)
    tokens = images * height * width
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    first = tl.program_id(1) * column_blocks * BLOCK_N
    last = tl.minimum(first + column_blocks * BLOCK_N, HID)
    if tile >= token_tiles:
        for start in range(bound(first), bound(last), BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            zero_border(hidden_ptr, tile - token_tiles, offs_n, images, height, width, padded_height, HID, BLOCK_M)
    else:
        META: tl.constexpr = (HID, C, BLOCK_K, False, False, PRECISION)
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = offs_m < tokens
        offs_row = row_offsets(offs_m, C)
        source, norm = (x_ptr, 1, 0), (norm_weight_ptr, norm_bias_ptr, eps)
        statistics = row_statistics(source, offs_row, row_mask, eps, C, BLOCK_K)
        image, row, column = split_index(offs_m, height, width)
        pixel = row_offsets(image, padded_height * (width + 2)) + (row + 1) * (width + 2) + column + 1
        for start in range(bound(first), bound(last), BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            acc = norm_linear(acc, source, offs_row, row_mask, statistics, norm, (weight_ptr, C), offs_n, META)
            h = acc + load_vector(bias_ptr, offs_n, HID)[None, :]
            if RELU:
                h = tl.maximum(h, 0.0)
            mask = row_mask[:, None] & (offs_n < HID)[None, :]
            ptrs = hidden_ptr + row_offsets(pixel, HID)[:, None] + offs_n[None, :]
            tl.store(ptrs, round_to(h, hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def group_positions(tile, images, height, width, padded_height, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """The `tile`-th BLOCK_P of all positions (image, group of ROWS rows, column), columns fastest.

    -> mask, image, first row of the group, column, bordered pixel of the top left tap. Past the end the last position
    is repeated, so loads stay inside the map.
    """
    groups = (height + ROWS - 1) // ROWS
    count = images * groups * width
    index = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    image, group, column = split_index(tl.minimum(index, count - 1), groups, width)
    top_left = row_offsets(image, padded_height * (width + 2)) + group * ROWS * (width + 2) + column
    return index < count, image, group * ROWS, column, top_left


@triton.jit(do_not_specialize=["images", "height", "width", "padded_height"])
def dwconv_fc2_kernel(
    x_ptr,
    hidden_ptr,
    taps_ptr,
    taps_bias_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    images,
    height,
    width,
    padded_height,
    C: tl.constexpr,
    HID: tl.constexpr,
    SCALED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x + scale * (gelu(dwconv(h)) @ W2^T + b2) for ROWS rows by BLOCK_P columns, in blocks of hidden channels.

    The product is transposed, W2 @ g^T: as first operand g would have to be in registers in the matrix unit's own
    layout, and the compiler then sends each of the 3 (ROWS + 2) loaded tiles through shared memory (58 barriers per
    block for ROWS = 4); as second operand only the ROWS tiles of g go there (8 barriers).
    """
    valid, image, row, column, top_left = group_positions(
        tl.program_id(0), images, height, width, padded_height, ROWS, BLOCK_P
    )
    offs_c = tl.arange(0, BLOCK_C)
    offs_window = row_offsets(top_left, HID)
    acc = (tl.zeros([BLOCK_C, BLOCK_P], tl.float32),) * ROWS
    for start in range(0, HID, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        ptrs = hidden_ptr + offs_window[:, None] + offs_h[None, :]
        taps_bias = tl.load(taps_bias_ptr + offs_h)
        h = depthwise_rows(ptrs, (width + 2) * HID, HID, taps_ptr, offs_h, taps_bias, HID, ROWS)
        w = tl.load(weight_ptr + offs_h[:, None] * C + offs_c[None, :], mask=(offs_c < C)[None, :], other=0.0)
        new = ()
        for r in tl.static_range(ROWS):
            g = round_to(gelu(h[r], EXACT), w.dtype)
            new += (dot(tl.trans(w), tl.trans(g), acc[r], PRECISION),)
        acc = new
    bias = load_vector(bias_ptr, offs_c, C)
    for r in tl.static_range(ROWS):
        mask = valid & (row + r < height)
        offs_row = row_offsets((image * height + row + r) * width + column, C)
        x = load_rows(x_ptr, offs_row, mask, offs_c, C)
        y = add_residual(x, tl.trans(acc[r]) + bias[None, :], scale_ptr, image, mask, SCALED)
        ptrs = out_ptr + offs_row[:, None] + offs_c[None, :]
        tl.store(ptrs, round_to(y, out_ptr.dtype.element_ty), mask=mask[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=["images", "height", "width", "padded_height"])
def dwconv_gelu_kernel(
    hidden_ptr,
    taps_ptr,
    taps_bias_ptr,
    out_ptr,
    images,
    height,
    width,
    padded_height,
    HID: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """gelu(dwconv(h)) (tokens, HID) for ROWS rows by BLOCK_P columns by BLOCK_H channels."""
    valid, image, row, column, top_left = group_positions(
        tl.program_id(0), images, height, width, padded_height, ROWS, BLOCK_P
    )
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ptrs = hidden_ptr + row_offsets(top_left, HID)[:, None] + offs_h[None, :]
    taps_bias = tl.load(taps_bias_ptr + offs_h)
    h = depthwise_rows(ptrs, (width + 2) * HID, HID, taps_ptr, offs_h, taps_bias, HID, ROWS)
    for r in tl.static_range(ROWS):
        offs_row = row_offsets((image * height + row + r) * width + column, HID)
        out = round_to(gelu(h[r], EXACT), out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_row[:, None] + offs_h[None, :], out, mask=(valid & (row + r < height))[:, None])


def _pack(w: MlpWeights) -> _Packed:
    hidden, channels = w.fc1.weight.shape
    extra = config.padded_hidden(hidden) - hidden
    weight = w.fc1.weight.detach()

    def grow(tensor: Tensor) -> Tensor:  # along its first dimension
        return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])]) if extra else tensor

    def bias(tensor: Tensor | None) -> Tensor:
        return grow(weight.new_zeros(hidden) if tensor is None else tensor.detach())

    taps = grow(w.dwconv.weight.detach().float().reshape(hidden, 9)).t().contiguous()
    fc2_t = grow(w.fc2.weight.detach().t()).contiguous() if config.fits_row(channels) else None
    return _Packed(grow(weight).contiguous(), bias(w.fc1.bias), taps, bias(w.dwconv.bias).float(), fc2_t)


def dwconv_mlp(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None = None) -> Tensor:
    """See `pvt_fast.ops`."""
    check_mlp(x, hw, w, residual_scale)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    images, tokens, channels = x.shape
    fused = config.fits_row(channels)
    hidden = w.fc1.weight.shape[0]
    weights = (w.fc1.weight, w.fc1.bias, w.dwconv.weight, w.dwconv.bias, w.fc2.weight)
    pack = packed(w.cache, "triton", tuple(t for t in weights if t is not None), lambda: _pack(w))
    shared = chip_of(x.device).shared
    shape = config.dwconv_fc2(channels, x.dtype, shared) if fused else config.dwconv_gelu(hidden, x.dtype)
    padded_height = -(-hw[0] // shape["ROWS"]) * shape["ROWS"] + 2
    h = _hidden_map(x, hw, w, spec, pack, padded_height)
    size = (images, *hw, padded_height)
    positions = images * (padded_height - 2) // shape["ROWS"] * hw[1]
    meta = {"HID": h.shape[3], "EXACT": x.dtype == torch.float32, **shape}
    grid = (triton.cdiv(positions, shape["BLOCK_P"]),)
    taps = (pack.taps, pack.taps_bias)
    if fused:
        pointers = (x, h, *taps, pack.fc2_t, w.fc2.bias, residual_scale, out)
        meta |= {"C": channels, "SCALED": residual_scale is not None, "PRECISION": dot_precision(x.dtype)}
        launch(dwconv_fc2_kernel, grid, x, *pointers, *size, **meta)
        return out
    g = torch.empty((images, tokens, h.shape[3]), dtype=x.dtype, device=x.device)
    launch(dwconv_gelu_kernel, (*grid, h.shape[3] // shape["BLOCK_H"]), x, h, *taps, g, *size, **meta)
    return linear(g, w.fc2, out, x, residual_scale)


def _hidden_map(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, pack: _Packed, padded_height: int) -> Tensor:
    """h with its border: (B, padded_height, W + 2, HID)."""
    images, _, channels = x.shape
    width = pack.fc1.shape[0]
    h = torch.empty((images, padded_height, hw[1] + 2, width), dtype=x.dtype, device=x.device)
    shape = config.norm_linear(channels, width, x.dtype, chip_of(x.device).shared)
    border = images * (padded_height * (hw[1] + 2) - hw[0] * hw[1])
    tiles = triton.cdiv(x.shape[0] * x.shape[1], shape["BLOCK_M"]) + triton.cdiv(border, shape["BLOCK_M"])
    grid = (tiles, triton.cdiv(width, _COLUMN_BLOCKS * shape["BLOCK_N"]))
    pointers = (x, w.norm.weight, w.norm.bias, pack.fc1, pack.fc1_bias, h)
    meta = {"C": channels, "HID": width, "RELU": spec.relu, "PRECISION": dot_precision(x.dtype), **shape}
    launch(norm_fc1_kernel, grid, x, *pointers, images, *hw, padded_height, _COLUMN_BLOCKS, w.norm.eps, **meta)
    return h
