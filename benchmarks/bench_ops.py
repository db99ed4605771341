"""Single ops at the stage shapes of b0 and b2, by pytest-benchmark: `pytest benchmarks/bench_ops.py`.

Each op's answer is held against float64 before its clock starts. Compare rows of one run only.
"""

from __future__ import annotations

import pytest
import torch

from pvt_fast import cpp, dispatch, reference, testing
from pvt_fast.testing import AttentionCase, MlpCase, PatchEmbedCase

CASES: list[testing.Case] = [
    PatchEmbedCase(1, (224, 224), 3, 64, kernel=7, stride=4),
    PatchEmbedCase(1, (56, 56), 64, 128, layout="nhwc"),
]
for dims in ((32, 64, 160, 256), (64, 128, 320, 512)):
    for stage, (dim, heads, ratio, sr) in enumerate(zip(dims, (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1), strict=True)):
        side = 56 >> stage
        CASES.append(MlpCase(1, (side, side), dim, ratio * dim))
        CASES.append(AttentionCase(1, (side, side), dim, heads, sr_ratio=sr))
        CASES.append(AttentionCase(1, (side, side), dim, heads, linear=True))


@pytest.mark.parametrize("backend", [cpp, reference], ids=["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark, case, dtype, backend):
    assert dispatch.load("cpp") is cpp
    arguments = case.make(dtype)
    with torch.inference_mode():
        testing.assert_parity(testing.run(backend, case, arguments), *testing.expected(case, arguments))
        benchmark.extra_info["gflop"] = case.gemm_flops() / 1e9
        benchmark(testing.run, backend, case, arguments)
