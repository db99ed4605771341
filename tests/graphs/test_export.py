"""What leaves the process: torch.export, AOTInductor packages, ONNX, TorchScript; at sizes that were not traced."""

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import TWO_STAGES, ours, randomised
from torch import Tensor, nn
from torch.export import Dim

import pvt_fast
from pvt_fast import PVT_V2
from pvt_fast.backend.cpp import weights
from pvt_fast.ops import packing, traceable
from pvt_fast.testing import assert_parity

pytestmark = pytest.mark.one_isa

ROOT = Path(__file__).parents[2]
LINEAR = pytest.mark.parametrize("linear", [False, True], ids=["sr", "linear"])
CLASSES = 100  # enough logits for the largest of their errors to say something
ANY_SIZE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def small(linear: bool) -> PVT_V2:
    return randomised(ours(CLASSES, linear=linear, **TWO_STAGES)).eval()


def one_stage(linear: bool) -> PVT_V2:
    """As little as has every op: compiling C++ takes seconds. More than 8 channels, as inductor inlines up to 8."""
    arguments = {"embed_dims": (16,), "num_heads": (2,), "mlp_ratios": (2,), "depths": (1,), "sr_ratios": (2,)}
    return randomised(ours(CLASSES, linear=linear, **arguments)).eval()


@torch.no_grad()
def assert_logits(actual: Tensor, model: PVT_V2, image: Tensor) -> None:
    """The parity rule, against the model's reference in float64 and float32."""
    before, model.backend = model.backend, "reference"
    try:
        same_dtype, truth = model(image), model.double()(image.double())
    finally:
        model.float().backend = before
    assert float(truth.std()) > 0.01
    assert_parity(actual, truth, same_dtype)


# -- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.not_interpreted
@LINEAR
@torch.no_grad()
def test_export_of_any_batch_and_size(linear, target):
    model = small(linear).to(target.device)
    model.backend = target.backend
    exported = torch.export.export(model, (images(2, 3, 50, 66).to(target.device),), dynamic_shapes=(ANY_SIZE,))
    for shape in ((2, 3, 50, 66), (3, 3, 96, 64), (5, 3, 33, 131)):
        image = images(*shape).to(target.device)
        with target.in_use():
            assert_logits(exported.module()(image), model, image)


@pytest.mark.only("cpp")
@torch.no_grad()
def test_an_exported_program_is_saved_and_loaded(target, tmp_path):
    model = small(linear=True)
    model.backend = target.backend
    exported = torch.export.export(model, (images(2, 3, 50, 66),), dynamic_shapes=(ANY_SIZE,))
    torch.export.save(exported, tmp_path / "model.pt2")
    again, image = torch.export.load(tmp_path / "model.pt2").module(), images(1, 3, 64, 40)
    with target.in_use():
        assert torch.equal(again(image), exported.module()(image))


# -- AOTInductor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def inductor_cache(tmp_path, monkeypatch) -> Path:
    """What an interrupted run left is not trusted."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path


# inductor's own imports, and what its runtime does with the constants that it maps read-only
QUIET_INDUCTOR = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
def package(model: PVT_V2, directory: Path) -> str:
    """The path of a package for batches and sizes that are multiples of 4."""
    sides = {0: Dim("batch", min=1, max=16), 2: 4 * Dim("h", min=4, max=64), 3: 4 * Dim("w", min=4, max=64)}
    exported = torch.export.export(model, (images(2, 3, 48, 64),), dynamic_shapes=(sides,))
    return torch._inductor.aoti_compile_and_package(exported, package_path=str(directory / "model.pt2"))


@pytest.mark.full
@pytest.mark.only("reference", "cpp")
@QUIET_INDUCTOR
@LINEAR
@torch.no_grad()
def test_aot_inductor_packages_run(linear, target, inductor_cache):
    """On the cpp backend it calls the registered ops, on the reference it is one library of plain operators."""
    model = one_stage(linear)
    model.backend = target.backend
    packaged = torch._inductor.aoti_load_package(package(model, inductor_cache))
    for shape in ((2, 3, 48, 64), (3, 3, 100, 36)):
        with target.in_use():
            torch.testing.assert_close(packaged(images(*shape)), model(images(*shape)))


IN_ANOTHER_PROCESS = """
import sys, torch
{imports}
path, image, logits = sys.argv[1:]
packaged = torch._inductor.aoti_load_package(path)
assert torch.equal(packaged(torch.load(image)), torch.load(logits))
print("equal")
"""


@pytest.mark.only("cpp")
@QUIET_INDUCTOR
@torch.no_grad()
def test_aot_inductor_package_packs_once_and_runs_in_another_process(target, inductor_cache, monkeypatch):
    model, image, other = one_stage(linear=True), images(2, 3, 60, 64), images(3, 3, 100, 36)
    model.backend = target.backend
    path = package(model, inductor_cache)
    packaged, built = torch._inductor.aoti_load_package(path), []

    def counted(kind, key, tensors, build, check):
        return packing.packed(kind, key, tensors, lambda alias: (built.append(kind), build(alias))[1], check)

    monkeypatch.setattr(weights, "packed", counted)
    expected = model(other)
    built.clear()
    first = packaged(image)
    assert len(built) == 5  # patch embed, attention, MLP, norm, head
    assert torch.equal(packaged(image), first)
    torch.testing.assert_close(packaged(other), expected)
    assert len(built) == 5

    files = [str(inductor_cache / name) for name in ("image.pt", "logits.pt")]
    for tensor, file in zip((image, first), files, strict=True):
        torch.save(tensor, file)
    for imports, outcome in (("import pvt_fast", "equal"), ("", "Could not find schema for pvt_fast::")):
        code = IN_ANOTHER_PROCESS.format(imports=imports)
        command = [sys.executable, "-c", code, path, *files]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert outcome in run.stdout + run.stderr, run.stderr


# -- ONNX ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def onnx_session(model: PVT_V2, image: Tensor, path: Path, dynamic: dict | None) -> onnxruntime.InferenceSession:
    shapes = None if dynamic is None else (dynamic,)
    torch.onnx.export(model, (image,), path, dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=["image"])
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(session: onnxruntime.InferenceSession, image: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


ONNX_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*copyreg:DeprecationWarning"
)


def exportable(linear: bool) -> PVT_V2:
    """The backend is one whose ops ONNX does not have: the exporter takes the reference all the same."""
    model = small(linear)
    model.backend = "cpp"
    return model


# The maps of the second stage are as large as those that linear attention pools to, larger, and smaller.
ONNX_SIZES = ((56, 56), (90, 130), (21, 33))


@ONNX_WARNINGS
@LINEAR
def test_onnx_of_any_batch_and_size(linear, tmp_path):
    model = exportable(linear)
    session = onnx_session(model, images(2, 3, 96, 64), tmp_path / "model.onnx", ANY_SIZE)
    for batch, size in enumerate(ONNX_SIZES, start=1):
        assert_logits(run_onnx(session, images(batch, 3, *size)), model, images(batch, 3, *size))


@ONNX_WARNINGS
@pytest.mark.parametrize("size", [pytest.param(ONNX_SIZES[0], marks=pytest.mark.full), *ONNX_SIZES[1:]], ids=str)
def test_onnx_of_one_size_with_a_free_batch(size, tmp_path):
    model = exportable(linear=True)
    session = onnx_session(model, images(2, 3, *size), tmp_path / "model.onnx", {0: Dim.DYNAMIC})
    for batch in (1, 3):
        assert_logits(run_onnx(session, images(batch, 3, *size)), model, images(batch, 3, *size))


@pytest.mark.full
@ONNX_WARNINGS
def test_onnx_of_b2_li(tmp_path):
    model = randomised(pvt_fast.pvt_v2_b2_li(num_classes=CLASSES)).eval()
    image = images(1, 3, 100, 130)
    assert_logits(run_onnx(onnx_session(model, image, tmp_path / "model.onnx", None), image), model, image)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 80), width=st.integers(1, 80))
def test_pooling_matrices_are_torchs_pooling(height, width):
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    product = traceable.averages(height, image) @ image @ traceable.averages(width, image).T
    torch.testing.assert_close(product, F.adaptive_avg_pool2d(image, 7), rtol=1e-13, atol=1e-14)


# -- TorchScript -----------------------------------------------------------------------------------------------------

DEPRECATED = pytest.mark.filterwarnings(r"ignore:`torch\.jit\..*` is deprecated:DeprecationWarning")


@pytest.mark.not_interpreted
@DEPRECATED
@LINEAR
@torch.no_grad()
def test_torchscript_records_plain_operators(linear, target, tmp_path):
    """Whatever the backend: a call of its kernels would leave an uninitialised tensor in the recording."""
    model = small(linear).to(target.device)
    model.backend = target.backend
    with target.in_use():
        traced = torch.jit.trace(model, images(2, 3, 50, 66).to(target.device))
    traced.save(tmp_path / "model.ts")
    again = torch.jit.load(tmp_path / "model.ts")
    for shape in ((2, 3, 50, 66), (3, 3, 96, 64), (1, 3, 33, 131)):
        image = images(*shape).to(target.device)
        assert_logits(again(image), model, image)


@DEPRECATED
def test_torch_jit_script_is_refused():
    for module in (small(linear=False), nn.Sequential(small(linear=False), nn.Softmax(dim=1))):
        with pytest.raises(TypeError, match=r"PVT_V2: torch\.jit\.script cannot compile it; use torch\.jit\.trace"):
            torch.jit.script(module)
