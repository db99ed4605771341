"""What is installed works from anywhere, and what cannot work says so."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pvt_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
IMPORTS = """
import pvt_fast
try:
    import pvt_fast.kernels
except pvt_fast.BackendUnavailable as error:  # triton is an extra
    assert "triton is not installed" in str(error)
import pvt_fast._C
print(pvt_fast.__file__)
"""


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PVT_FAST_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


def succeed(command: list, cwd: Path, **environment: str) -> str:
    result = run(command, cwd, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def copy_sources(target: Path) -> Path:
    """The tree as a fresh clone has it, no built extension, no caches; of the instruction sets only the first.

    What is tested here is where the parts of an installation are found; compiling every instruction set, and any of it
    for speed, takes minutes (.ci/run does so for the wheel).
    """
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
            shutil.copytree(source, target / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, target)
    for isa in (target / "csrc" / "isa").glob("*.cpp"):
        if isa.name != "scalar.cpp":
            isa.unlink()
    build_script = (target / "setup.py").read_text()
    assert '"-O3"' in build_script
    (target / "setup.py").write_text(build_script.replace('"-O3"', '"-O0"'))
    return target


def environment_beside_this_one(target: Path) -> Path:
    """A new environment that sees this one's packages, but not what is installed from this tree; its python."""
    succeed([sys.executable, "-m", "venv", "--without-pip", target], ROOT)
    python = target / "bin" / "python"
    site = succeed([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], target).strip()
    # a plain path line: .pth files of the other directory, such as editable installs, are not processed
    (Path(site) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *arguments: object, cwd: Path) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    succeed([*pip, "--no-build-isolation", *arguments], cwd)


@pytest.fixture(scope="session")
def fresh_tree(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("clone") / "tree")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the tree (an isolated build needs an index: .ci/run does that one)."""
    tree = copy_sources(tmp_path_factory.mktemp("build") / "tree")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist"]
    succeed([sys.executable, "-m", "pip", "wheel", *options, "."], tree)
    (built,) = (tree / "dist").glob("pvt_fast-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of an environment with the wheel installed."""
    python = environment_beside_this_one(tmp_path_factory.mktemp("wheel") / "venv")
    install(python, wheel, cwd=wheel.parent)
    return python


def test_the_wheel_works_from_elsewhere(installed, tmp_path):
    path = succeed([installed, "-c", IMPORTS], tmp_path).strip()
    assert Path(path).is_relative_to(installed.parent.parent)
    forward = (
        "import torch, pvt_fast; model = pvt_fast.PVT_V2(depths=(1, 1, 1, 1), num_classes=2).eval();"
        "model.backend = 'cpp'; print(model(torch.zeros(1, 3, 64, 64)).shape)"
    )
    assert succeed([installed, "-c", forward], tmp_path).strip() == "torch.Size([1, 2])"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    listing = succeed([sys.executable, "-m", "zipfile", "-l", wheel], wheel.parent)
    names = [line.split()[0] for line in listing.splitlines()[1:]]
    assert {name.split("/")[0] for name in names} == {"pvt_fast", names[-1].split("/")[0]}
    assert names[-1].split("/")[0].endswith(".dist-info")
    expected = {"pvt_fast/kernels/__init__.py", "pvt_fast/kernels/mlp/forward.py", "pvt_fast/accelerate/peers.py"}
    assert expected <= set(names)
    assert [name for name in names if re.fullmatch(r"pvt_fast/_C\..*(so|pyd)", name)]


def test_a_source_tree_that_shadows_the_install_says_so(installed, fresh_tree):
    result = run([installed, "-c", "import pvt_fast"], fresh_tree)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: pvt_fast: the compiled extension pvt_fast._C is not in {fresh_tree / 'pvt_fast'}"
    )
    assert "run Python from another directory, or work in the tree with `pip install -e .`" in last


@pytest.mark.full  # such an install is what these tests run in
def test_an_editable_install_works_from_any_directory(tmp_path):
    tree = copy_sources(tmp_path / "tree")
    python = environment_beside_this_one(tmp_path / "venv")
    install(python, "-e", ".", cwd=tree)
    for directory in (tmp_path, tree):
        assert Path(succeed([python, "-c", IMPORTS], directory).strip()) == tree / "pvt_fast" / "__init__.py"
    kernels = "import pvt_fast.kernels; print(pvt_fast.kernels.__file__)"
    result = run([python, "-c", kernels], tmp_path)
    assert result.returncode == 0 or "triton is not installed" in result.stderr
    assert result.returncode == 1 or Path(result.stdout.strip()) == tree / "kernels" / "__init__.py"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import pvt_fast
status = {item.name: item for item in pvt_fast.backends()}
assert not status["triton"].available
print(status["triton"].reason)
model = pvt_fast.PVT_V2(depths=(1, 1, 1, 1), num_classes=2).eval()
print(model(torch.zeros(1, 3, 64, 64)).shape)
model.backend = "triton"
try:
    model(torch.zeros(1, 3, 64, 64))
except pvt_fast.BackendUnavailable as error:
    print(error)
"""


def test_without_triton(tmp_path):
    """In a fresh process: the package imports and runs, and says what is missing when asked for it."""
    reason, shape, refusal = succeed([sys.executable, "-c", WITHOUT_TRITON], ROOT).strip().splitlines()
    assert "triton" in reason
    assert shape == "torch.Size([1, 2])"
    assert refusal == f"backend 'triton' cannot run: {reason}"


def test_importing_the_package_imports_no_triton_and_no_backend():
    late = "pvt_fast.backend.cpp", "pvt_fast.kernels"
    loaded = f"import sys, pvt_fast; print([name for name in {late} if name in sys.modules])"
    assert succeed([sys.executable, "-c", loaded], ROOT).strip() == "[]"


# -- the folder kernels/ at the root, which goes by the name of a package of PyPI --------------------------------------

# In a fresh process, without a torchvision, which may be built for another torch.
FRESH = """
import os, sys
sys.modules["torchvision"] = None
os.environ.pop("TRITON_INTERPRET", None)
"""
TRANSFORMERS = """
from transformers import SegformerForSemanticSegmentation
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""
OURS = 'print([name for name in sys.modules if name.startswith("pvt_fast")])'


def test_transformers_can_be_imported_at_the_root():
    assert succeed([sys.executable, "-c", FRESH + TRANSFORMERS + OURS], ROOT).split() == ["False", "[]"]


def test_the_example_with_a_model_of_transformers_runs_at_the_root_without_triton():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "from transformers" in block)
    succeed([sys.executable, "-c", FRESH + 'sys.modules["triton"] = None\n' + example], ROOT)


def test_an_installed_package_of_that_name_is_found_at_the_root(tmp_path):
    package, metadata = tmp_path / "kernels", tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    package.mkdir()
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    # with every name that transformers asks of it
    (package / "__init__.py").write_text("def __getattr__(name):\n    return lambda *_, **__: lambda kind: kind\n")
    (package / "layer.py").touch()
    both = f"""
sys.path.append({str(tmp_path)!r})
import kernels.layer
from pvt_fast.kernels import BACKEND
print(kernels.__file__, sys.modules["kernels"] is kernels, BACKEND.attention.__module__)
"""
    printed = succeed([sys.executable, "-c", FRESH + both + TRANSFORMERS], ROOT).split()
    assert printed == [str(package / "__init__.py"), "True", "pvt_fast.kernels.attention.forward", "True"]


def test_the_build_script_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60


def sources_of_the_extension() -> list[Path]:
    return [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".h")]


def test_the_extension_includes_no_torch_header_and_python_once():
    """One wheel serves every torch; only the bindings, and what they compare of Python objects, know Python."""
    assert len(sources_of_the_extension()) > 5
    includes = {
        path.relative_to(ROOT / "csrc").as_posix(): re.findall(
            r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M
        )
        for path in sources_of_the_extension()
    }
    for path, names in includes.items():
        assert not [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))], path
    python = {
        path for path, names in includes.items() if any(name.startswith(("pybind11", "Python")) for name in names)
    }
    assert python == {"bindings.cpp", "attributes.h"}


def test_pinned_versions_satisfy_the_declared_ones():
    """constraints.txt pins torch, which an unpinned install may bring with gigabytes of CUDA libraries."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert "torch" in pins
    assert tuple(map(int, pins["torch"].split(".")[:2])) >= (2, 10)
