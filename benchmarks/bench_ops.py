"""Single ops at the stage shapes of b0, b2 and b2_li, by pytest-benchmark: `pytest benchmarks/bench_ops.py`.

For a saved history (--benchmark-save, --benchmark-compare) and a profiler's runs; `cpu.py --op` sets the times against
the machine's peaks. Each op's answer is held against float64 before its clock starts. Compare rows of one run only.
"""

from __future__ import annotations

import pytest
import torch

from pvt_fast import testing
from pvt_fast.backend import cpp, dispatch
from pvt_fast.config import VARIANTS, PVTConfig
from pvt_fast.ops import reference

MODELS = ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li")
CASES = list(
    dict.fromkeys(case for m in MODELS for case in testing.model_cases(PVTConfig(**VARIANTS[m]), 1, (224, 224)))
)


@pytest.mark.parametrize("backend", [cpp, reference], ids=["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark, case, dtype, backend):
    assert dispatch.load("cpp") is cpp.BACKEND
    arguments = case.make(dtype)
    with torch.inference_mode():
        testing.assert_parity(testing.run(backend, case, arguments), *testing.expected(case, arguments))
        benchmark.extra_info["gflop"] = case.gemm_flops() / 1e9
        benchmark(testing.run, backend, case, arguments)
