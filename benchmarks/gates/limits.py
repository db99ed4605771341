"""The gates: what each row of a compilation is held to."""

from __future__ import annotations

from typing import Any

from .compilations import CHIPS

Row = dict[str, Any]  # of a compilation: target, dtype, kernel, constants and resources

NO_MATRIX_PRODUCT = {"dwconv_gelu_kernel", "layer_norm_kernel", "pool_kernel", "token_mean_kernel"}
# Loops whose length is known when compiled may be unrolled; these have another.
LOOPING = {"dwconv_fc2_kernel", "head_attention_kernel", "norm_fc1_kernel", "norm_linear_kernel"}

# Instructions per hidden element in the main loop of dwconv_fc2_kernel on sm_90, by type of the hidden map and width of
# the tile of channels; what was measured, and half an instruction. GELU and taps alone are 10 in packed fp16, 22 in
# fp32 with the conversions. Below 25 the kernel is bound by memory as much as by arithmetic (benchmarks/GPU_NOTES.md).
INSTRUCTIONS = {("half", 64): 19.3, ("half", 128): 21.3, ("full", 64): 35.3, ("full", 128): 37.8}


def over_shared_memory(row: Row) -> bool:
    return row["shared"] > CHIPS[row["target"]].shared


def spills(row: Row) -> bool:
    return row["spills"] > 0


def has_wrong_matrix_instructions(row: Row) -> bool:
    """NVIDIA's units do not multiply true fp32: there a matrix instruction would be TF32."""
    if row["kernel"] in NO_MATRIX_PRODUCT or (row["dtype"] == "fp32" and row["target"].startswith("sm_")):
        return row["matrix"]
    in_loop = row.get("matrix_in_loop", row["matrix"])  # AMD's loops are not looked at
    return not (in_loop if row["kernel"] in LOOPING else row["matrix"])


def has_narrow_loads(row: Row) -> bool:
    """No 16-byte load. The first patch embed gathers single pixels, in rows of the user's image."""
    return row["load"] < 16 and row["constants"].get("PER_TAP") is not False


def has_many_instructions(row: Row) -> bool:
    limit = instruction_limit(row)
    return limit is not None and row["per_element"] > limit


def instruction_limit(row: Row) -> float | None:
    if row["target"] != "sm_90" or row["dtype"] == "fp32" or "per_element" not in row:
        return None
    half = row["constants"]["BLOCK_H"] == 32
    return INSTRUCTIONS["half" if half else "full", row["constants"]["BLOCK_C"]]


GATES = (over_shared_memory, spills, has_wrong_matrix_instructions, has_narrow_loads, has_many_instructions)
