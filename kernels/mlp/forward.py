"""x + fc2(gelu(dwconv3x3(h))), h = fc1(LayerNorm(x)) or relu of it: the hidden map crosses memory twice.

`norm_fc1_kernel` writes h into a map with a border of zeros, one pixel on each side, so that the convolution's
padding is data and its loads need no masks. Rows are padded to whole groups of ROWS. Then `dwconv_fc2_kernel` does all
the rest: for C <= 128 always, wider while its tiles leave processors idle, as each column of tiles convolves anew.
Else `dwconv_gelu_kernel` and `linear.linear_kernel` follow.

In a bf16 model the map is fp16 wherever the weights prove that its values fit (`_fits_half`): packed fp16 arithmetic
halves the instructions of convolution and GELU, which bind this op, and rounds four to eight times finer than bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvt_fast.ops import HW, Linear, MlpSpec, MlpWeights, check_mlp

from .. import block_sizes
from ..chip import Chip
from ..launch import chip_of, dot_precision, first_time, launch, operands, warm
from ..linear import linear
from ..primitives import (
    add_residual,
    bound,
    depthwise_rows,
    dot,
    gelu,
    gelu_quarter,
    is_last,
    load_rows,
    load_sum,
    load_vector,
    norm_rows,
    round_to,
    row_offsets,
    rows_product,
    split_index,
)
from ..weights import dense, packed_off_capture
from ..workspace import workspace

# Values of an fp16 map are proven to stay below this. fp16 ends at 65504.
_HALF_LIMIT = 2.0**15
# The largest of the taps and of fc2's weights must reach this, or their small values lose digits in fp16.
_HALF_MIN = 2.0**-8


class _Packed(NamedTuple):
    """Weights with the hidden dimension padded by zeros to whole blocks. half: the map, taps and fc2 are fp16."""

    half: bool
    fc1: Tensor  # (HID, C)
    fc1_bias: Tensor  # (HID,)
    taps: Tensor  # (9, HID) fp32; a quarter of them if half (see gelu_quarter)
    taps_bias: Tensor  # (HID,), likewise
    fc2: Tensor  # (C, HID); four times if half
    fc2_t: Tensor  # (HID, C), its transpose


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
    HELD: tl.constexpr,
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
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = offs_m < tokens
        norm = (norm_weight_ptr, norm_bias_ptr, eps)
        NORM: tl.constexpr = (C, BLOCK_K, False, False, weight_ptr.dtype.element_ty, HELD)
        y = norm_rows((x_ptr, 1, 0), row_offsets(offs_m, C), row_mask, norm, NORM)
        image, row, column = split_index(offs_m, height, width)
        pixel = row_offsets(image, padded_height * (width + 2)) + (row + 1) * (width + 2) + column + 1
        for start in range(bound(first), bound(last), BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + load_vector(bias_ptr, offs_n, HID)[None, :]
            h = rows_product(acc, y, (weight_ptr, C), offs_n, HID, NORM, PRECISION)
            if RELU:
                h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
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


@triton.jit
def activated(h, dtype: tl.constexpr, EXACT: tl.constexpr):
    """gelu of the convolution's result in the type of fc2's weights: of fp32, or of a quarter of it in fp16."""
    if h.dtype == tl.float16:
        return gelu_quarter(h)
    else:
        return round_to(gelu(h, EXACT), dtype)


@triton.jit(do_not_specialize=["images", "height", "width", "padded_height", "parts"])
def dwconv_fc2_kernel(
    x_ptr,
    hidden_ptr,
    taps_ptr,
    taps_bias_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    images,
    height,
    width,
    padded_height,
    parts,
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
    """x + scale * (gelu(dwconv(h)) @ W2^T + b2) for ROWS rows by BLOCK_P columns by BLOCK_C channels.

    With parts > 1 a program goes through its part of the hidden channels only and leaves fp32 sums in partial
    (parts, images, height * width, C); the last of a tile adds them up, always in the same order.

    The product is transposed, W2 @ g^T: as first operand g would have to be in registers in the matrix unit's own
    layout, and the compiler then sends each of the 3 (ROWS + 2) loaded tiles through shared memory (58 barriers per
    block for ROWS = 4); as second operand only the ROWS tiles of g go there (8 barriers).
    """
    tile, part = tl.program_id(0), tl.program_id(2)
    valid, image, row, column, top_left = group_positions(tile, images, height, width, padded_height, ROWS, BLOCK_P)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_window = row_offsets(top_left, HID)
    BLOCKS: tl.constexpr = HID // BLOCK_H
    first, last = BLOCKS * part // parts * BLOCK_H, BLOCKS * (part + 1) // parts * BLOCK_H
    acc = (tl.zeros([BLOCK_C, BLOCK_P], tl.float32),) * ROWS
    for start in range(bound(first), bound(last), BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        ptrs = hidden_ptr + offs_window[:, None] + offs_h[None, :]
        h = depthwise_rows(ptrs, (width + 2) * HID, HID, taps_ptr, offs_h, tl.load(taps_bias_ptr + offs_h), (HID, ROWS))
        w = tl.load(weight_ptr + offs_h[:, None] * C + offs_c[None, :], mask=(offs_c < C)[None, :], other=0.0)
        new = ()
        for r in tl.static_range(ROWS):
            new += (dot(tl.trans(w), tl.trans(activated(h[r], w.dtype, EXACT)), acc[r], PRECISION),)
        acc = new
    token = (image * height + row) * width + column
    part_stride = row_offsets(images, height * width) * C
    finishes = parts == 1
    if parts > 1:
        for r in tl.static_range(ROWS):
            mask = (valid & (row + r < height))[:, None] & (offs_c < C)[None, :]
            ptrs = partial_ptr + part * part_stride + row_offsets(token + r * width, C)[:, None] + offs_c[None, :]
            tl.store(ptrs, tl.trans(acc[r]), mask=mask)
        finishes = is_last(counter_ptr + tile * tl.num_programs(1) + tl.program_id(1), parts)
    if finishes:
        bias = load_vector(bias_ptr, offs_c, C)
        for r in tl.static_range(ROWS):
            mask = valid & (row + r < height)
            offs_row = row_offsets(token + r * width, C)
            z = tl.trans(acc[r])
            if parts > 1:
                z = load_sum(partial_ptr, offs_row, mask, offs_c, parts, part_stride, C)
            x = load_rows(x_ptr, offs_row, mask, offs_c, C)
            y = add_residual(x, z + bias[None, :], scale_ptr, image, mask, SCALED)
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
    """gelu(dwconv(h)) (tokens, HID) for ROWS rows by BLOCK_P columns by BLOCK_H channels; a quarter of it in fp16."""
    valid, image, row, column, top_left = group_positions(
        tl.program_id(0), images, height, width, padded_height, ROWS, BLOCK_P
    )
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ptrs = hidden_ptr + row_offsets(top_left, HID)[:, None] + offs_h[None, :]
    h = depthwise_rows(ptrs, (width + 2) * HID, HID, taps_ptr, offs_h, tl.load(taps_bias_ptr + offs_h), (HID, ROWS))
    for r in tl.static_range(ROWS):
        offs_row = row_offsets((image * height + row + r) * width + column, HID)
        out = activated(h[r], out_ptr.dtype.element_ty, EXACT)
        tl.store(out_ptr + offs_row[:, None] + offs_h[None, :], out, mask=(valid & (row + r < height))[:, None])


def hidden_bound(w: MlpWeights) -> Tensor:
    """What no value of the hidden map's channels (HID,) exceeds, whatever the input.

    LayerNorm's output is a vector no longer than sqrt(C) times its weight, plus its bias; so |fc1_j| is at most
    sqrt(C) * |W1_j * weight| + |W1_j @ bias + b1_j|.
    """
    weight = w.fc1.weight.detach().float()
    spread = (weight * w.norm.weight.detach().float()).norm(dim=1) * weight.shape[1] ** 0.5
    shift = weight @ w.norm.bias.detach().float()
    return spread + (shift if w.fc1.bias is None else shift + w.fc1.bias.detach().float()).abs()


def _fits_half(w: MlpWeights, dtype: torch.dtype) -> bool:
    """Whether fp16 holds every value of the hidden map and of its convolution, and the digits of taps and fc2."""
    if dtype != torch.bfloat16:
        return False
    if w.fc1.weight.is_meta:
        return True
    hidden = hidden_bound(w)
    taps, fc2 = w.dwconv.weight.detach().float().flatten(1).abs(), w.fc2.weight.detach().float().abs().max()
    bias = 0.0 if w.dwconv.bias is None else w.dwconv.bias.detach().float().abs()
    largest = torch.stack([hidden.max(), (hidden * taps.sum(1) + bias).max(), 4 * fc2, taps.max()])
    return bool((largest < _HALF_LIMIT).all() & (torch.stack([fc2, taps.max()]) >= _HALF_MIN).all())


def _pack(w: MlpWeights, dtype: torch.dtype) -> _Packed:
    """dtype: of the products."""
    hidden = len(w.fc1.weight)
    extra = block_sizes.padded_hidden(hidden) - hidden
    weight = w.fc1.weight.detach()
    half = _fits_half(w, dtype)

    def grow(tensor: Tensor) -> Tensor:  # along its first dimension
        return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])]) if extra else tensor

    def bias(tensor: Tensor | None) -> Tensor:
        return grow(weight.new_zeros(hidden) if tensor is None else tensor.detach())

    taps = grow(w.dwconv.weight.detach().float().reshape(hidden, 9)).t()
    taps_bias, fc2_t = bias(w.dwconv.bias).float(), grow(w.fc2.weight.detach().t())
    fc2_t = fc2_t if half else fc2_t.to(dtype)
    if half:
        taps, taps_bias, fc2_t = (taps / 4).half(), (taps_bias / 4).half(), (fc2_t.float() * 4).half()
    fc2, fc2_t = fc2_t.t().contiguous(), fc2_t.contiguous()
    return _Packed(
        half, grow(weight).to(dtype).contiguous(), bias(w.fc1.bias), taps.contiguous(), taps_bias, fc2, fc2_t
    )


class _Call(NamedTuple):
    """One call's tensors and sizes."""

    x: Tensor
    hidden: Tensor  # the bordered map (B, padded_height, W + 2, HID)
    w: MlpWeights
    pack: _Packed
    scale: Tensor | None
    out: Tensor
    size: tuple[int, int, int, int]  # images, height, width, padded_height

    @property
    def dtype(self) -> torch.dtype:
        """That of the products."""
        return self.pack.fc1.dtype

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def tiles(self, shape: block_sizes.BlockSizes) -> int:
        """Tiles of ROWS rows by BLOCK_P columns."""
        images, height, width, _ = self.size
        return triton.cdiv(images * triton.cdiv(height, shape["ROWS"]) * width, shape["BLOCK_P"])


def mlp(
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """See `pvt_fast.ops`."""
    check_mlp(x, hw, w, spec, residual_scale, products, plain=True)
    x, residual_scale = operands("mlp", x, residual_scale, spec)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    weights = (w.norm.weight, w.norm.bias, w.fc1.weight, w.fc1.bias, w.dwconv.weight, w.dwconv.bias, w.fc2.weight)
    dtype = products or x.dtype
    pack = packed_off_capture("mlp", weights, lambda: _pack(w, dtype), products)
    chip = chip_of(x.device)
    padded_height = -(-hw[0] // block_sizes.DWCONV_ROWS) * block_sizes.DWCONV_ROWS + 2
    hidden = _hidden_map(x, hw, w, spec, pack, padded_height, chip)
    call = _Call(x, hidden, w, pack, residual_scale, out, (x.shape[0], *hw, padded_height))
    if block_sizes.fits_row(x.shape[2]):
        _fused(launch, call, chip)
        return out
    shape = block_sizes.dwconv_fc2(x.shape[2], dtype, pack.half, chip)
    few = call.tiles(shape) * triton.cdiv(x.shape[2], shape["BLOCK_C"]) <= chip.processors
    chosen, other = (_fused, _unfused) if few else (_unfused, _fused)
    if first_time(("mlp", x.shape[2], hidden.shape[3], x.dtype, dtype, pack.half, residual_scale is None)):
        other(warm, call, chip)
    chosen(launch, call, chip)
    return out


def _fused(start: Callable, call: _Call, chip: Chip) -> None:
    """All behind the hidden map in one kernel."""
    channels, hidden = call.x.shape[2], call.hidden.shape[3]
    pointers = (call.x, call.hidden, call.pack.taps, call.pack.taps_bias, call.pack.fc2_t, *dense(call.w.fc2.bias))
    meta = {"C": channels, "HID": hidden, "SCALED": call.scale is not None, "EXACT": call.exact}
    shape = block_sizes.dwconv_fc2(channels, call.dtype, call.pack.half, chip)
    tiles = (call.tiles(shape), triton.cdiv(channels, shape["BLOCK_C"]))
    parts = block_sizes.parts(tiles[0] * tiles[1], hidden // shape["BLOCK_H"], chip)
    split = parts > 1
    partial, counter = workspace(call.x.device, split * parts * call.x.numel(), split * tiles[0] * tiles[1])
    start(
        dwconv_fc2_kernel,
        (*tiles, parts),
        call.x,
        *pointers,
        *(call.scale, call.out, partial, counter),
        *(*call.size, parts),
        PRECISION=dot_precision(call.dtype),
        **meta,
        **shape,
    )


def _unfused(start: Callable, call: _Call, chip: Chip) -> None:
    """Convolution and GELU, then fc2."""
    hidden = call.hidden.shape[3]
    g = torch.empty((*call.x.shape[:2], hidden), dtype=call.hidden.dtype, device=call.x.device)
    pointers = (call.hidden, call.pack.taps, call.pack.taps_bias, g)
    shape = block_sizes.dwconv_gelu(call.pack.half)
    grid = (call.tiles(shape), hidden // shape["BLOCK_H"])
    start(dwconv_gelu_kernel, grid, call.x, *pointers, *call.size, HID=hidden, EXACT=call.exact, **shape)
    linear(start, g, Linear(call.pack.fc2, call.w.fc2.bias), call.out, call.x, call.scale)


def _hidden_map(
    x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, pack: _Packed, padded_height: int, chip: Chip
) -> Tensor:
    """h with its border: (B, padded_height, W + 2, HID)."""
    images, _, channels = x.shape
    width = pack.fc1.shape[0]
    dtype = pack.fc1.dtype
    stored = torch.float16 if pack.half else dtype
    h = torch.empty((images, padded_height, hw[1] + 2, width), dtype=stored, device=x.device)
    border = images * (padded_height * (hw[1] + 2) - hw[0] * hw[1])
    pointers = (x, *dense(*w.norm[:2]), pack.fc1, pack.fc1_bias, h)
    meta = {"C": channels, "HID": width, "RELU": spec.relu, "PRECISION": dot_precision(dtype)}
    shape = block_sizes.norm_linear(channels, width, dtype, chip)
    tiles = triton.cdiv(x.shape[0] * x.shape[1], shape["BLOCK_M"]) + triton.cdiv(border, shape["BLOCK_M"])
    columns = triton.cdiv(width, shape["BLOCK_N"])
    per_program = block_sizes.columns_per_program(tiles, columns, chip)
    sizes = (images, *hw, padded_height, per_program)
    grid = (tiles, triton.cdiv(columns, per_program))
    launch(norm_fc1_kernel, grid, x, *pointers, *sizes, w.norm.eps, **meta, **shape)
    return h
