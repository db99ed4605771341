"""The choice of instruction set, and the packed ops under several Python threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pvt_fast
from pvt_fast.backend import cpp
from pvt_fast.backend.dispatch import BackendMisconfigured
from pvt_fast.testing import MlpCase, expected, run

ROOT = Path(__file__).parents[2]

FORWARD = """
import torch, pvt_fast
model = pvt_fast.PVT_V2(depths=(1, 1, 1, 1), num_classes=2).eval()
with torch.no_grad():
    model(torch.zeros(1, 3, 64, 64))
from pvt_fast.backend import cpp
print(cpp.isa())
"""


def forward_with(isa: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PVT_FAST_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", FORWARD], env=environment, capture_output=True, text=True)


def test_the_best_runnable_isa_is_taken():
    assert cpp.isa() == cpp.isas()[0]
    assert cpp.isas() == [isa for isa in cpp.ISAS if isa in cpp.isas()]
    assert cpp.isas()[-1] == "scalar"


def test_the_environment_caps_the_isa():
    result = forward_with("scalar")
    assert result.stdout.strip() == "scalar", result.stderr


def test_a_cap_that_cannot_run_is_an_error_and_no_fallback():
    """Also for a model that leaves the choice of backend to us: the reference would be a silent answer."""
    result = forward_with("sse9")
    assert result.returncode != 0
    runnable = ", ".join(cpp.isas())
    assert f"PVT_FAST_ISA must be one that this CPU runs ({runnable}), got 'sse9'" in result.stderr


def test_use_isa_refuses_by_name_and_changes_nothing():
    before = cpp.isa()
    with pytest.raises(BackendMisconfigured, match="use_isa: name must be one that this CPU runs"), cpp.use_isa("sse9"):
        pytest.fail("the block must not run")
    assert cpp.isa() == before


def test_threads_share_a_model():
    """Packed at first use by whichever comes first; scratch memory is each thread's own."""
    torch.manual_seed(0)
    model = pvt_fast.PVT_V2(depths=(1, 1, 1, 1), num_classes=5, linear=True).eval()
    model.backend = "cpp"
    images = torch.randn(16, 1, 3, 40, 56)
    with torch.no_grad():
        alone = [model(image) for image in images]

    def forward(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(image)

    pvt_fast.refresh(model)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(forward, images))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("height", [13, 29, 57])
def test_every_way_of_sharing_an_image_gives_the_same_bits(height):
    """One thread walks bands of the whole image; two share it by bands, or, where it is low, by hidden panels."""
    case = MlpCase(3, (height, 9), 48, 160)
    arguments = case.make(torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(cpp, case, arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0].double(), expected(case, arguments)[0], rtol=1e-5, atol=1e-5)
