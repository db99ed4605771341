"""Block sizes of every kernel: pure functions of widths, dtype and the target's shared memory.

Nothing here depends on batch or map size, so a new image size compiles nothing (attention knows 3 sizes of key
block). Each function returns the keyword constants of one launch. `tests/test_triton_compile.py` compiles what these
functions return, for every published width and target, and holds it to no spills and to the shared-memory limit.
"""

from __future__ import annotations

from typing import Any

import torch

Config = dict[str, Any]

# Up to this width one program owns whole rows of the output: fc2, proj and the patch embed's norm are fused behind
# what feeds them. Wider rows would need C x rows accumulators (512 x 64 fp32 is all registers of an SM), re-read all
# weights per 64 tokens (64 FLOP per byte of L2) and leave most SMs idle at small batch; there the last product is a
# kernel of its own that tiles rows and columns.
ROW_LIMIT = 128

# Below this much shared memory (AMD's 64 KiB) loads are buffered two deep instead of three.
_DEEP_PIPELINE_BYTES = 128 * 1024
# At least this much means wgmma or tcgen05, which read operands from shared memory; mma.sync and MFMA hold them in
# registers, which leaves fewer for accumulators.
_SHARED_OPERAND_BYTES = 200 * 1024


def fits_row(channels: int) -> bool:
    """Whether one program owns whole rows of `channels` columns."""
    return channels <= ROW_LIMIT


def next_power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n, and at least `least` (the smallest side of a matrix tile)."""
    return max(least, 1 << (n - 1).bit_length())


def padded_hidden(hidden: int) -> int:
    """Stored width of the hidden map: whole 16-channel blocks, so that its loads need no masks."""
    return -(-hidden // 16) * 16


def _stages(shared: int) -> int:
    return 3 if shared > _DEEP_PIPELINE_BYTES else 2


def row_block(channels: int, dtype: torch.dtype) -> int:
    """Columns per step along a row: the whole row if narrow, else the largest block of <= 64 that wastes least."""
    if fits_row(channels) and dtype != torch.float32:
        return next_power(channels)
    if fits_row(channels):
        return min(64, next_power(channels))
    largest = 32 if dtype == torch.float32 else 64
    return largest if channels % largest == 0 or channels % 32 else 32


def norm_linear(channels: int, columns: int, dtype: torch.dtype, shared: int, summed: bool = False) -> Config:
    """LayerNorm then linear, a tile of rows by a tile of columns per program. summed: the rows come in parts."""
    full = dtype == torch.float32
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, next_power(columns)),
        "BLOCK_K": min(64, next_power(channels)) if summed else row_block(channels, dtype),
        "num_warps": 8 if full else 4,
        "num_stages": 1 if fits_row(channels) or summed else _stages(shared) - 1,
    }


def linear(columns: int, inner: int, dtype: torch.dtype, shared: int) -> Config:
    """Plain linear with its epilogue."""
    full = dtype == torch.float32
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, next_power(columns)),
        "BLOCK_K": min(32 if full else 64, next_power(inner)),
        "num_warps": 8 if full else 4,
        "num_stages": _stages(shared),
    }


def dwconv_gelu(hidden: int, dtype: torch.dtype) -> Config:
    """The depthwise convolution alone: 8 channels (one 16-byte load) per thread."""
    return {"BLOCK_P": 32, "BLOCK_H": 16 if hidden % 32 else 32, "ROWS": 2, "num_warps": 4, "num_stages": 1}


def dwconv_fc2(channels: int, dtype: torch.dtype, shared: int) -> Config:
    """Depthwise convolution, GELU, fc2: ROWS x BLOCK_P outputs of all C channels are kept in registers.

    For sm_90 at C = 64 and 128 this gives 35 and 37 instructions per hidden element in the main loop (17 are the
    convolution's FMAs and GELU's), no spills. C is the product's M, which wgmma and tcgen05 want to be at least 64.
    """
    full = dtype == torch.float32
    wide = next_power(channels) > 64
    return {
        "BLOCK_P": 32,
        "BLOCK_H": 16,
        "BLOCK_C": next_power(channels, least=16 if full else 64),
        "ROWS": 2 if wide and (full or shared <= _DEEP_PIPELINE_BYTES) else 4,
        "num_warps": 8 if wide and shared < _SHARED_OPERAND_BYTES else 4,
        "num_stages": 1,
    }


def spatial_reduction(channels: int, dtype: torch.dtype, shared: int) -> Config:
    """Strided R x R convolution behind a LayerNorm."""
    return {
        **norm_linear(channels, channels, dtype, shared),
        "BLOCK_N": next_power(channels)
        if fits_row(channels) and dtype != torch.float32
        else min(64, next_power(channels)),
    }


def reduction_splits(tiles: int, taps: int) -> int:
    """Into how many parts the R * R taps are divided, each for its own programs: enough to give 128 programs.

    At batch 1 the reduced map is 49 rows, one tile, and its sum 64 taps of C products long (stage 1): a single program
    would take longer than the rest of the network. At most 16 parts: they are read back in fp32.
    """
    wanted = min(16, taps, max(1, 128 // tiles))
    return -(-taps // -(-taps // wanted))


def pool(channels: int) -> Config:
    """Adaptive pooling: a few whole rows per step."""
    return {"BLOCK_T": max(1, min(16, 4096 // next_power(channels))), "BLOCK_C": next_power(channels), "num_warps": 4}


def fuses_projection(channels: int, dtype: torch.dtype, shared: int) -> bool:
    """Whether one attention program owns whole rows: 128 columns leave too few registers on MFMA and in fp32."""
    scarce = dtype == torch.float32 or shared <= _DEEP_PIPELINE_BYTES
    return channels <= (64 if scarce else ROW_LIMIT)


def attention(channels: int, head_dim: int, keys: int, dtype: torch.dtype, shared: int) -> Config:
    """Queries of one tile against all keys; up to 64 keys in one block."""
    full = dtype == torch.float32
    fused = fuses_projection(channels, dtype, shared)
    block_keys = min(64, next_power(keys))
    return {
        "BLOCK_M": 16 if full else 64,
        "BLOCK_D": next_power(head_dim),
        "BLOCK_KEYS": block_keys,
        "ONE_BLOCK": keys <= block_keys,
        **({"BLOCK_C": next_power(channels)} if fused else {"BLOCK_K": row_block(channels, dtype)}),
        "num_warps": 8 if full or (fused and channels > 64) else 4,
        "num_stages": 1 if keys <= block_keys else 3 if shared >= _SHARED_OPERAND_BYTES else 2,
    }


def patch_embed(in_channels: int, channels: int, dtype: torch.dtype, shared: int) -> Config:
    """Implicit GEMM. PER_TAP walks the taps with whole blocks of channels, else taps and channels are one index."""
    full = dtype == torch.float32
    per_tap = in_channels >= 16
    block_k = 32 if full or not per_tap or in_channels % 64 else 64
    wide = fits_row(channels) and channels > 64
    return {
        "BLOCK_M": 128 if wide and not full else 64,
        "BLOCK_N": next_power(channels) if fits_row(channels) else 64,
        "BLOCK_K": block_k,
        "PER_TAP": per_tap,
        "FUSE_NORM": fits_row(channels),
        "num_warps": 8 if full or wide else 4,
        "num_stages": _stages(shared) if per_tap else 2,
    }


def rows(channels: int) -> Config:
    """LayerNorm of whole rows."""
    block_c = next_power(channels)
    return {"BLOCK_M": max(1, 4096 // block_c), "BLOCK_C": block_c, "num_warps": 4}


def token_mean(channels: int) -> Config:
    """Mean over tokens, 64 channels per program."""
    return {"BLOCK_T": 32, "BLOCK_C": min(64, next_power(channels)), "num_warps": 4}
