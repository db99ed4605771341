"""Block sizes of every kernel: pure functions of widths, dtype and the chip; and how grids are cut.

Block sizes do not depend on batch or map size, so a new image size compiles nothing (attention knows key maps that fit
one block and larger ones, and some ops have one form for grids that leave processors idle and one for others: both are
compiled at first). `make gpu-gates` compiles what these functions return, for every published width and target, and
holds it to no spills and to the shared-memory limit.
"""

from __future__ import annotations

from typing import Any

import torch

from .chip import Chip

BlockSizes = dict[str, Any]

# Up to this width one program owns whole rows of the output: fc2, proj and the patch embed's norm are fused behind
# what feeds them. Wider rows would need C x rows accumulators (512 x 64 fp32 is all registers of an SM).
ROW_LIMIT = 128

# Queries per program of the attention of wide rows; up to so many of them are their own keys' whole map.
QUERIES = 64
# Rows of a group in the depthwise convolution: the hidden map is padded to whole groups.
DWCONV_ROWS = 4
# Its channels per step: the hidden map is padded to whole blocks, so that its loads need no masks.
HIDDEN_BLOCK = 32

# Below this much shared memory (AMD's 64 KiB) loads are buffered two deep instead of three.
_DEEP_PIPELINE_BYTES = 128 * 1024
# At least this much means wgmma or tcgen05, which read operands from shared memory; mma.sync and MFMA hold them in
# registers, which leaves fewer for accumulators.
_SHARED_OPERAND_BYTES = 200 * 1024
# Sums over programs: at most so many parts, as the last program reads all of them.
_MAX_PARTS = 8


def fits_row(channels: int) -> bool:
    """Whether one program owns whole rows of `channels` columns."""
    return channels <= ROW_LIMIT


def next_power(n: int, minimum: int = 16) -> int:
    """The smallest power of two that is at least n, and at least `minimum` (the smallest side of a matrix tile)."""
    return max(minimum, 1 << (n - 1).bit_length())


def padded_hidden(hidden: int) -> int:
    """Stored width of the hidden map."""
    return -(-hidden // HIDDEN_BLOCK) * HIDDEN_BLOCK


def parts(tiles: int, steps: int, chip: Chip) -> int:
    """Into how many programs a sum of `steps` steps is divided when `tiles` programs do not fill the chip.

    At batch 1 a stage has 1 to 25 tiles of 128 tokens for more than 100 processors, and a tile's sum is what takes the
    time. A part has two steps or more.
    """
    return max(1, min(_MAX_PARTS, steps // 2, chip.processors // tiles))


def columns_per_program(tiles: int, columns: int, chip: Chip) -> int:
    """How many of a row's column blocks one program goes through, reading and normalising the row once for all.

    All of them where the tiles of rows alone are two programs for each processor, else fewer: then the grid is that.
    """
    return -(-columns // max(1, min(columns, -(-2 * chip.processors // tiles))))


def _stages(chip: Chip) -> int:
    return 3 if chip.shared > _DEEP_PIPELINE_BYTES else 2


def _is_blackwell(chip: Chip) -> bool:
    return chip.arch.startswith("sm_10")


def _lacks_operand_memory(chip: Chip) -> bool:
    """Whether it is NVIDIA's and its matrix instruction, mma.sync, reads all operands from registers."""
    return chip.arch.startswith("sm_") and chip.shared < _SHARED_OPERAND_BYTES


def _all_registers(chip: Chip, where: bool) -> BlockSizes:
    """For kernels of which ptxas else spills one or two values to stay on a step of occupancy."""
    return {"maxnreg": 255} if where and chip.arch.startswith("sm_") else {}


def row_block(channels: int, dtype: torch.dtype) -> int:
    """Columns per tile of a row: the largest block of at most 64 (fp32: 32) that wastes none, if there is one."""
    largest = 32 if dtype == torch.float32 else 64
    if channels <= largest:
        return next_power(channels)
    return largest if channels % largest == 0 or channels % 32 else 32


def holds_rows(dtype: torch.dtype, chip: Chip) -> bool:
    """Whether normalised rows are kept for all products with them (see primitives.norm_rows)."""
    return dtype != torch.float32 and chip.shared >= _SHARED_OPERAND_BYTES


def makes_own_keys(dtype: torch.dtype, chip: Chip) -> bool:
    """Whether a program of attention may make its heads' keys and values itself.

    Only with rows that are held, as it repeats the products with them; and not for sm_100, where Triton 3.6 makes an
    empty kernel of that form.
    """
    return holds_rows(dtype, chip) and not _is_blackwell(chip)


def norm_linear(channels: int, columns: int, dtype: torch.dtype, chip: Chip) -> BlockSizes:
    """LayerNorm then linear: a tile of rows, held, by blocks of columns."""
    full = dtype == torch.float32
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, next_power(columns)),
        "BLOCK_K": row_block(channels, dtype),
        "HELD": holds_rows(dtype, chip),
        "num_warps": 8 if full else 4,
        "num_stages": 1 if holds_rows(dtype, chip) else _stages(chip) - 1,
        **_all_registers(chip, _is_blackwell(chip) and not full),
    }


def linear(columns: int, inner: int, dtype: torch.dtype, chip: Chip) -> BlockSizes:
    """Plain linear with its epilogue."""
    full = dtype == torch.float32
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(64, next_power(columns)),
        "BLOCK_K": min(32 if full else 64, next_power(inner)),
        "num_warps": 8 if full else 4,
        "num_stages": _stages(chip),
    }


def dwconv_gelu(half: bool) -> BlockSizes:
    """The depthwise convolution alone: 8 channels (one 16-byte load) and more per thread."""
    return {"BLOCK_P": 32, "BLOCK_H": HIDDEN_BLOCK, "ROWS": 4 if half else 2, "num_warps": 2, "num_stages": 1}


def dwconv_fc2(channels: int, dtype: torch.dtype, half: bool, chip: Chip) -> BlockSizes:
    """Depthwise convolution, GELU, fc2: ROWS x BLOCK_P outputs of BLOCK_C channels are kept in registers.

    For sm_90 and an fp16 map this gives 18 (64 channels) and 21 (128) instructions per hidden element in the main
    loop. C is the product's M, which wgmma and tcgen05 want to be at least 64.
    """
    full = dtype == torch.float32
    wide = next_power(channels) > 64
    columns = next_power(channels, minimum=16 if full else 64) if fits_row(channels) else 64
    scarce = _lacks_operand_memory(chip)
    return {
        "BLOCK_P": 16 if (half and scarce) or (full and columns > 64) else 32,
        "BLOCK_H": HIDDEN_BLOCK if half else 16,
        "BLOCK_C": columns,
        "ROWS": 2 if wide and (full or chip.shared <= _DEEP_PIPELINE_BYTES) else 4,
        "num_warps": 8 if wide and scarce and not half else 4,
        "num_stages": 1,
        **_all_registers(chip, scarce and not half and not full),
    }


def spatial_reduction(channels: int, dtype: torch.dtype, to_kv: bool, linear: bool, chip: Chip) -> BlockSizes:
    """Strided R x R convolution behind a LayerNorm, which each block of columns repeats: wide blocks, unless rows are
    so few that their blocks of columns are wanted as work."""
    full = dtype == torch.float32
    widest = 128 if to_kv and not full and not linear else 64
    return {
        "BLOCK_M": 64,
        "BLOCK_N": min(widest, next_power(channels)),
        "BLOCK_K": row_block(channels, dtype),
        "HELD": holds_rows(dtype, chip),
        "num_warps": 8 if full or (linear and channels > 320 and _is_blackwell(chip)) else 4,
        "num_stages": 1,
        **_all_registers(chip, linear),
    }


def pool(channels: int) -> BlockSizes:
    """Adaptive pooling: a few whole rows per step."""
    block_c = next_power(channels)
    return {"BLOCK_T": max(1, min(16, 4096 // block_c)), "BLOCK_C": block_c, "num_warps": 4 if block_c > 64 else 2}


def fuses_projection(channels: int, dtype: torch.dtype, chip: Chip) -> bool:
    """Whether attention keeps the projection's sums of whole rows: 128 columns leave too few registers on MFMA and in
    fp32."""
    scarce = dtype == torch.float32 or chip.shared <= _DEEP_PIPELINE_BYTES
    return channels <= (64 if scarce else ROW_LIMIT)


def fits_one_block(keys: int) -> bool:
    """Whether attention takes all keys at once."""
    return keys <= 64


def fills(tiles: int, chip: Chip) -> bool:
    """Whether so many programs are enough work for the chip: at most half of it idles."""
    return 2 * tiles >= chip.processors


def attention(channels: int, head_dim: int, one_block: bool, dtype: torch.dtype, chip: Chip) -> BlockSizes:
    """Queries of one tile against all keys; up to 64 keys in one block."""
    full = dtype == torch.float32
    fused = fuses_projection(channels, dtype, chip)
    return {
        "BLOCK_M": 16 if full else QUERIES,
        "BLOCK_D": next_power(head_dim),
        "BLOCK_KEYS": 32 if full and not fused and not one_block else 64,
        "ONE_BLOCK": one_block,
        **(
            {"BLOCK_C": next_power(channels)}
            if fused
            else {"BLOCK_K": row_block(channels, dtype), "HELD": holds_rows(dtype, chip)}
        ),
        "num_warps": 8 if fused and (full or channels > 64 or (channels <= 32 and chip.arch.startswith("sm_"))) else 4,
        "num_stages": 1 if one_block else 3 if chip.shared >= _SHARED_OPERAND_BYTES and not full else 2,
        **_all_registers(chip, full or (_lacks_operand_memory(chip) and not fused)),
    }


def patch_embed(in_channels: int, channels: int, dtype: torch.dtype, chip: Chip) -> BlockSizes:
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
        "WHOLE_ROWS": fits_row(channels),
        "BLOCK_C": next_power(channels),
        "BLOCK_ROWS": max(1, 8192 // next_power(channels)) if not fits_row(channels) else 1,
        "num_warps": 8 if full or wide else 4,
        "num_stages": _stages(chip) if per_tap else 2,
    }


def rows(channels: int) -> BlockSizes:
    """LayerNorm of whole rows."""
    block_c = next_power(channels)
    return {"BLOCK_M": max(1, 4096 // block_c), "BLOCK_C": block_c, "num_warps": 4}


def token_mean(channels: int) -> BlockSizes:
    """Mean over tokens, 64 channels per program."""
    return {"BLOCK_T": 32, "BLOCK_C": min(64, next_power(channels)), "num_warps": 4}
