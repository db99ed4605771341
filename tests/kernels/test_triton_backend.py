"""The triton backend around its kernels: when it runs, what it says when it cannot, and its address arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.case import Case
from benchmarks.gpu import roofline
from pvt_fast import kernels
from pvt_fast.backend import dispatch
from pvt_fast.backend.dispatch import Facts
from pvt_fast.kernels import BACKEND, block_sizes, launch
from pvt_fast.kernels.chip import PRETENDED, Chip
from pvt_fast.kernels.primitives import row_offsets, split_index
from pvt_fast.ops import Norm
from pvt_fast.testing import AttentionCase, MlpCase

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import pvt_fast
status = {status.name: status for status in pvt_fast.backends()}
assert not status["triton"].available
print(status["triton"].reason)
assert status["reference"].available
"""

WITHOUT_INTERPRETER = """
import torch
from benchmarks.case import Case
from benchmarks.gpu import roofline
from pvt_fast import kernels
from pvt_fast.ops import Facts
print(kernels.BACKEND.unsupported(Facts("cpu", torch.float32)))
"""


def run_python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_the_package_works_and_says_so():
    assert "triton is not installed" in run_python(WITHOUT_TRITON)


def test_refuses_the_cpu_without_the_interpreter():
    assert "need a CUDA device, got cpu" in run_python(WITHOUT_INTERPRETER)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts("cuda", torch.float64), "float32, bfloat16 and float16, got torch.float64"),
        (Facts("cuda", torch.float32, dropout=True), "no dropout"),
        (Facts("cuda", torch.float32, products=torch.float32), "takes bfloat16 and float16, got torch.float32"),
    ],
)
def test_refusals_give_the_reason(facts, reason):
    assert reason in kernels.BACKEND.unsupported(facts)
    with pytest.raises(dispatch.BackendUnavailable, match=reason):
        dispatch.select(facts, "triton")


@pytest.mark.parametrize("case", [AttentionCase(1, (4, 4), 16, 1), MlpCase(1, (4, 4), 16, 16)], ids=str)
def test_a_rate_of_dropout_is_refused(case):
    """It would compute something else."""
    x, hw, w, spec, _ = case.make(torch.float32)
    refusal = f"^{case.op}: backend 'triton' cannot run: it has no dropout"
    for rate in (name for name in spec._fields if name.endswith("drop")):
        with pytest.raises(dispatch.BackendUnavailable, match=refusal):
            getattr(BACKEND, case.op)(x, hw, w, spec._replace(**{rate: 0.1}))


def test_a_recording_lets_ops_run_on_any_device_but_does_not_draw_models_to_them(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    facts = Facts("cpu", torch.float32)
    with launch.recorded():
        assert "need a CUDA device, got cpu" in BACKEND.unsupported(facts)
        launch.require_runs("mlp", torch.zeros(1))
    with pytest.raises(dispatch.BackendUnavailable, match="need a CUDA device, got cpu"):
        launch.require_runs("mlp", torch.zeros(1))


@triton.jit
def address_kernel(out_ptr, index, height, width, STRIDE: tl.constexpr):
    """Where a token of a bordered map lies, as norm_fc1_kernel computes it."""
    offs_m = index + tl.arange(0, 2)
    image, row, column = split_index(offs_m, height, width)
    pixel = row_offsets(image, (height + 2) * (width + 2)) + (row + 1) * (width + 2) + column + 1
    tl.store(out_ptr + tl.arange(0, 2), row_offsets(pixel, STRIDE))


def test_offsets_beyond_2_to_the_31():
    """b2's stage-1 hidden map at batch 1400: 1400 * 58 * 58 * 512 = 2.4e9 elements."""
    batch, height, width, hidden = 1400, 56, 56, 512
    last = batch * height * width - 2
    device = "cpu" if launch.INTERPRETED else "cuda"
    out = torch.empty(2, dtype=torch.int64, device=device)
    address_kernel[(1,)](out, last, height, width, STRIDE=hidden)
    row = (batch - 1) * (height + 2) + height
    expected = [(row * (width + 2) + column + 1) * hidden for column in (width - 2, width - 1)]
    assert out.tolist() == expected
    assert min(expected) > 2**31


def test_hidden_map_is_padded_to_whole_blocks():
    for hidden in (1, 15, 16, 77, 640, 2048):
        padded = block_sizes.padded_hidden(hidden)
        assert 0 <= padded - hidden < block_sizes.HIDDEN_BLOCK
        for half in (False, True):
            assert padded % block_sizes.dwconv_gelu(half)["BLOCK_H"] == 0
            assert padded % block_sizes.dwconv_fc2(64, torch.bfloat16, half, PRETENDED)["BLOCK_H"] == 0


def test_rows_of_the_convolution_divide_its_padding():
    for dtype, half in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        for chip in (PRETENDED, Chip("gfx942", 64 * 1024, 304)):
            assert block_sizes.DWCONV_ROWS % block_sizes.dwconv_fc2(128, dtype, half, chip)["ROWS"] == 0
            assert block_sizes.DWCONV_ROWS % block_sizes.dwconv_gelu(half)["ROWS"] == 0


@pytest.mark.parametrize("tiles", [1, 2, 7, 49, 131, 132, 5000])
def test_parts_of_a_sum(tiles):
    """Never so many that a part is empty, nor more programs than processors where tiles alone are fewer."""
    for steps in (0, 1, 2, 9, 16, 64):
        parts = block_sizes.parts(tiles, steps, PRETENDED)
        assert 1 <= parts <= max(1, steps)
        assert parts == 1 or parts * tiles <= PRETENDED.processors
        bounds = [(steps * part // parts, steps * (part + 1) // parts) for part in range(parts)]
        assert [step for first, last in bounds for step in range(first, last)] == list(range(steps))


@pytest.mark.parametrize("tiles", [1, 4, 131, 784])
def test_programs_share_all_column_blocks(tiles):
    for columns in (1, 5, 16, 32):
        each = block_sizes.columns_per_program(tiles, columns, PRETENDED)
        assert 1 <= each <= columns
        assert each == columns or tiles < 2 * PRETENDED.processors


@pytest.mark.parametrize(
    ("name", "most"),
    [("pvt_v2_b0", 46), ("pvt_v2_b1", 46), ("pvt_v2_b2", 83), ("pvt_v2_b2_li", 99), ("pvt_v2_b5", 261)],
)
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_launches_of_a_forward(name, most, batch):
    """At most 4 a block in stages 1 and 2, 5 in the others, one more in the linear form, and 10 around them."""
    launches = roofline.model_launches(Case(name, batch, 224, "bf16"))
    assert len(launches) + 1 <= most, "with torch's linear of the classifier"


def test_a_recording_keeps_launches_in_order_and_ends():
    x = torch.randn(1, 4, 16)
    norm = Norm(torch.ones(16), torch.zeros(16), 1e-6)
    device = "cpu" if launch.INTERPRETED else "cuda"
    with launch.recorded() as launches:
        BACKEND.layer_norm(x.to(device), Norm(norm.weight.to(device), norm.bias.to(device), 1e-6))
        BACKEND.head(x.to(device), None)
    BACKEND.head(x.to(device), None)
    assert [item.name for item in launches] == ["layer_norm_kernel", "token_mean_kernel"]
    assert launches[0].args[0].shape == x.shape
