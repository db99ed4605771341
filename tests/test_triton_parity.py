"""Parity of the kernels where `testing.CASES` is too large for the interpreter: every published width on a small map,
and the tails of every mask. The op cases themselves run in test_ops.py."""

import pytest
import torch

from pvt_fast import kernels
from pvt_fast.kernels import launch
from pvt_fast.ops import Norm
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase, assert_parity, expected, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# The width decides which kernels run (fused rows up to 128, then tiled), the dtype how GELU and products are done.
WIDTHS = (
    (PatchEmbedCase(1, (9, 12), 3, 32, kernel=7, stride=4), BF16),
    (PatchEmbedCase(1, (5, 6), 128, 320, layout="nhwc"), BF16),
    (PatchEmbedCase(1, (3, 3), 320, 512, layout="nhwc"), FP16),
    (AttentionCase(1, (8, 8), 64, 1, sr_ratio=8), BF16),
    (AttentionCase(1, (4, 8), 128, 2, sr_ratio=4), FP16),
    (AttentionCase(1, (2, 4), 320, 5, sr_ratio=2, scale_residual=True), BF16),
    (AttentionCase(1, (4, 2), 160, 5, sr_ratio=2), FP32),
    (AttentionCase(1, (2, 2), 512, 8), BF16),
    (AttentionCase(2, (2, 3), 256, 8, scale_residual=True), FP16),
    (MlpCase(1, (3, 3), 32, 256), BF16),
    (MlpCase(1, (5, 2), 64, 128), FP16),
    (MlpCase(1, (3, 2), 128, 128, relu=True), BF16),
    (MlpCase(1, (2, 3), 160, 64, scale_residual=True), BF16),
    (MlpCase(1, (3, 3), 320, 80), FP32),
    (MlpCase(2, (2, 2), 512, 96, relu=True), FP16),
)
# Numbers of keys at, below and above a key block, maps that no block divides, and heads of many widths.
TAILS = (
    (AttentionCase(1, (7, 1), 16, 1), FP32),
    (AttentionCase(1, (7, 7), 24, 1), BF16),
    (AttentionCase(1, (5, 10), 32, 1), FP16),
    (AttentionCase(1, (1, 65), 20, 2), BF16),
    (AttentionCase(1, (16, 16), 16, 1), BF16),
    (AttentionCase(1, (9, 7), 36, 2, sr_ratio=3), FP32),
    (AttentionCase(1, (1, 3), 136, 2, bias=False), BF16),
    (MlpCase(1, (1, 1), 16, 16), FP16),
    (MlpCase(2, (6, 1), 20, 17, layout="sliced"), BF16),
    (MlpCase(1, (1, 9), 130, 33), FP32),
    (PatchEmbedCase(2, (2, 3), 17, 130, layout="sliced"), BF16),
)


@pytest.mark.parametrize(("op_case", "op_dtype"), [*WIDTHS, *TAILS], ids=str)
def test_parity(op_case, op_dtype):
    arguments = op_case.make(op_dtype, DEVICE)
    assert_parity(run(kernels, op_case, arguments), *expected(op_case, arguments), what=str(op_case))


@pytest.mark.parametrize("op_dtype", [FP32, BF16, FP16], ids=str)
def test_layer_norm_of_a_mean_far_above_the_spread(op_dtype):
    x = (torch.randn(3, 5, 70, dtype=torch.float64) + 100).to(op_dtype)
    norm = Norm(torch.randn(70).to(op_dtype), torch.randn(70).to(op_dtype), 1e-6)
    actual = kernels.layer_norm(x.to(DEVICE), Norm(norm.weight.to(DEVICE), norm.bias.to(DEVICE), norm.eps))
    truth = torch.nn.functional.layer_norm(x.double(), (70,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert_parity(actual, truth, torch.nn.functional.layer_norm(x, (70,), norm.weight, norm.bias, norm.eps))


def test_a_border_written_by_an_earlier_call_does_not_leak():
    """The same memory, first as the hidden map of one shape and then of another."""
    for case in (MlpCase(1, (4, 4), 16, 32), MlpCase(1, (2, 8), 16, 32), MlpCase(4, (1, 1), 16, 32)):
        arguments = case.make(FP32, DEVICE)
        assert_parity(run(kernels, case, arguments), *expected(case, arguments), what=str(case))
