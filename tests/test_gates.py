"""A part of the gates of gpu_gates.py, of what a new batch or map size compiles, and of what a forward launches.

`make gpu-gates` compiles all variants in all dtypes for all targets.
"""

import json

import pytest
from gpu_gates import GATES, NO_MATRIX_PRODUCT, Job, compile_rows, run_python, table

# b2 has all kernels but pooling. bf16, with maps in fp16 and in bf16, on every target; what else there is on sm_90.
JOBS = (
    *(Job("sm_90", "bf16", "pvt_v2_b0,pvt_v2_b2,pvt_v2_b2_li", share) for share in ("0/2", "1/2")),
    *(Job(target, "bf16", "pvt_v2_b2", share) for target in ("gfx942", "sm_89") for share in ("0/4",)),
    *(Job("sm_90", dtype, "pvt_v2_b2", "0/4") for dtype in ("fp16", "fp32")),
)
ALL_KERNELS = NO_MATRIX_PRODUCT | {
    "attention_kernel",
    "dwconv_fc2_kernel",
    "head_attention_kernel",
    "linear_kernel",
    "norm_fc1_kernel",
    "norm_linear_kernel",
    "patch_embed_kernel",
    "spatial_reduction_kernel",
}

NEW_SIZES = """
import torch
from triton_compile import CHIPS, compilations
for variant in ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5"):
    one, *others = (
        {made.key() for made in compilations([variant], torch.bfloat16, CHIPS["sm_90"], (batch,), sizes)}
        for batch in (1, 2, 7, 48, 256) for sizes in ((224,), (250,), (256, 512), (1024,))
    )
    assert one and all(other == one for other in others), [other ^ one for other in others]
"""

SAME_WIDTHS = """
import torch
from triton_compile import CHIPS, compilations
b2 = {made.key() for made in compilations(["pvt_v2_b2"], torch.bfloat16, CHIPS["sm_90"])}
for variant in ("pvt_v2_b1", "pvt_v2_b3", "pvt_v2_b4"):
    assert {made.key() for made in compilations([variant], torch.bfloat16, CHIPS["sm_90"])} == b2, variant
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """One row per distinct kernel; each compiled once for the module."""
    rows = compile_rows(JOBS)
    print("\n".join(table(rows)))
    return rows


def test_every_kernel_is_compiled(compiled):
    assert {row["kernel"] for row in compiled if row["target"] == "sm_90"} == ALL_KERNELS


@pytest.mark.parametrize("gate", GATES)
def test_gates(compiled, gate):
    beyond = [row for row in compiled if gate(row)]
    assert not beyond, "\n".join(map(json.dumps, beyond))


def test_instructions_are_counted_for_both_types_of_map(compiled):
    counts = {(row["constants"]["BLOCK_C"], row["per_element"] < 25) for row in compiled if "per_element" in row}
    assert {(64, True), (128, True), (64, False), (128, False)} <= counts


def test_a_new_batch_or_map_size_compiles_nothing():
    run_python("-c", NEW_SIZES)


def test_variants_of_the_same_widths_share_their_kernels():
    run_python("-c", SAME_WIDTHS)
