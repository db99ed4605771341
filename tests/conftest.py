"""What every test shares: the backends under test, seeds, poisoned memory, and a timm that can be imported.

A test that takes `case`, `target` and `dtype` (or some of them) runs for every combination: `case` from
`pvt_fast.testing.CASES`, `target` for each backend and instruction set that runs here, `dtype` for each dtype of that
target. What cannot run here is not collected, and the header names it; what `--backend` asks for must run.
"""

import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: threads of each would wait for one another, fifty times as long as they work
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # read by triton when it is first imported: kernels then run as Python on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import pvt_fast
from benchmarks.torchvision_ops import let_torchvision_be_imported
from pvt_fast.accelerate.fused import FusedBlock
from pvt_fast.backend import cpp, dispatch
from pvt_fast.ops import Backend, Facts
from pvt_fast.testing import CASES, Case, PatchEmbedCase

# before a test imports timm
let_torchvision_be_imported()

# In triton's interpreter a call takes seconds above this many floating-point operations, ...
INTERPRETER_MAX_FLOPS = 4_000_000
# ... and above this many output tokens too, however narrow they are.
INTERPRETER_MAX_TOKENS = 12 * 12

# Tests marked full are divided into so many parts; a prime, so that runs at the same hour of each day get to all.
FULL_PARTS = 11

# Files of tests that cannot run here, and why; the header names them.
IGNORED: dict[str, str] = {}
if not torch.cuda.is_available():
    IGNORED["kernels/test_gpu.py"] = "needs a CUDA device"
if not all(importlib.util.find_spec(name) for name in ("peft", "torchao")):
    IGNORED["accelerate/test_adapters.py"] = "needs peft and torchao: make test-peers"
collect_ignore = list(IGNORED)

DTYPE_IDS = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# The dtypes a backend is tested in: all that it claims on the device it is tested on.
DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16),
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


class Target(NamedTuple):
    """A backend to test, for "cpp" on one instruction set."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend}.{self.isa}"

    @property
    def ops(self) -> Backend:
        return dispatch.load(self.backend)

    @property
    def device(self) -> str:
        return "cuda" if self.backend == "triton" and torch.cuda.is_available() else "cpu"

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of the backend; float16, which "cpp" hands to its float32 kernels, on the best instruction set only."""
        best = self.isa is None or self.isa == cpp.isas()[0]
        return tuple(dtype for dtype in DTYPES[self.backend] if best or dtype != torch.float16)

    def in_use(self) -> AbstractContextManager:
        """Within the block, the backend's ops run on this target's instruction set."""
        return nullcontext() if self.isa is None else cpp.use_isa(self.isa)

    def takes(self, case: Case) -> bool:
        """False for cases too large for the interpreter; other targets take every case."""
        return not self.interpreted or (
            case.gemm_flops() <= INTERPRETER_MAX_FLOPS and output_tokens(case) <= INTERPRETER_MAX_TOKENS
        )


def output_tokens(case: Case) -> int:
    height, width = case.hw
    stride = case.stride if isinstance(case, PatchEmbedCase) else 1
    return case.batch * (height // stride) * (width // stride)


class NotRunnable(NamedTuple):
    target: str
    reason: str


def find_targets() -> tuple[list[Target], list[NotRunnable]]:
    """(what runs here, what does not and why), over every backend and every instruction set of "cpp"."""
    targets, missing = [], []
    for name in ("reference", *(name for name in dispatch.ORDER if name != "reference")):
        _, reason = dispatch.usable(name, Facts(Target(name).device, torch.float32))
        if reason is not None:
            missing.append(NotRunnable(name, reason))
        elif name == "cpp":
            runnable = cpp.isas()
            targets += [Target(name, isa) for isa in runnable]
            missing += [
                NotRunnable(f"cpp.{isa}", f"not one of this CPU's: {', '.join(runnable)}")
                for isa in cpp.ISAS
                if isa not in runnable
            ]
        else:
            targets.append(Target(name))
    return targets, missing


def choose_targets(asked: list[str], targets: list[Target], missing: list[NotRunnable]) -> list[Target]:
    """The targets that `--backend` names; pytest.UsageError for a name that cannot run here."""
    chosen = []
    for name in asked:
        matching = [target for target in targets if name in (str(target), target.backend)]
        if not matching:
            reasons = [f"{item.target}: {item.reason}" for item in missing if item.target.startswith(name)]
            raise pytest.UsageError(
                f"--backend {name} cannot run here: {'; '.join(reasons) or 'there is no such backend or ISA'}; "
                f"runnable: {', '.join(map(str, targets))}"
            )
        chosen += [target for target in matching if target not in chosen]
    return chosen or targets


TARGETS, NOT_RUNNABLE = find_targets()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME[.ISA]",
        help="test only this backend (repeatable); an error if it cannot run here. Default: all that can.",
    )
    parser.addoption("--full", action="store_true", help="also the tests marked full")
    parser.addoption(
        "--full-part",
        type=int,
        metavar="N",
        help=f"of the tests marked full part N, 0 to {FULL_PARTS - 1}; CI takes another each hour",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "not_interpreted: not collected for a backend that runs in triton's interpreter, where it takes minutes",
    )
    config.addinivalue_line(
        "markers",
        "full(*backends): only with --full (for these backends): shows nothing that no other test shows, but in one "
        "more combination",
    )
    config.addinivalue_line("markers", "only(backend): not collected for other backends")
    config.addinivalue_line("markers", "no_target: set here on a test that none of the backends under test can run")
    config.addinivalue_line(
        "markers", "one_isa: of a backend's instruction sets only the first asked for; for what does not depend on it"
    )
    config.targets = choose_targets(config.getoption("--backend"), TARGETS, NOT_RUNNABLE)


def pytest_report_header(config: pytest.Config) -> list[str]:
    isas = " ".join(target.isa for target in config.targets if target.isa)
    names = dict.fromkeys(target.backend for target in config.targets)
    tested = [
        f"{name}[{isas}]" if name == "cpp" else f"{name} (interpreter)" if Target(name).interpreted else name
        for name in names
    ]
    lines = [f"backends under test: {', '.join(tested)}"]
    if not config.getoption("--full"):
        part = config.getoption("--full-part")
        lines.append("of the tests marked full: " + ("none" if part is None else f"part {part} of {FULL_PARTS}"))
    lines += [f"not runnable here: {file} ({reason})" for file, reason in IGNORED.items()]
    for item in NOT_RUNNABLE:
        lines.append(f"not runnable here: {item.target} ({item.reason})")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `case`, `target` and `dtype` as one product, without the combinations that do not exist."""
    wanted = [name for name in ("case", "target", "dtype") if name in metafunc.fixturenames]
    marker = metafunc.definition.get_closest_marker("parametrize")
    own = set() if marker is None else {name.strip() for name in str(marker.args[0]).split(",")}
    wanted = [name for name in wanted if name not in own]
    if not wanted:
        return
    rows = []
    for target in _targets_of(metafunc.definition, metafunc.config.targets):
        for case in CASES if "case" in wanted else [None]:
            if case is not None and not target.takes(case):
                continue
            for dtype in target.dtypes if "dtype" in wanted else [None]:
                parts = {"case": case, "target": target, "dtype": dtype}
                label = {"case": str(case), "target": str(target), "dtype": DTYPE_IDS.get(dtype)}
                values = tuple(parts[name] for name in wanted)
                row = pytest.param(*values, id="-".join(label[name] for name in wanted))
                if all(row.id != other.id for other in rows):
                    rows.append(row)
    if not rows:  # not collected at all, rather than pytest's skip of an empty set
        rows.append(pytest.param(*[None] * len(wanted), id="none", marks=pytest.mark.no_target))
    metafunc.parametrize(wanted, rows)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = [item for item in items if item.get_closest_marker("no_target") or not _is_wanted(item, config)]
    if without:
        items[:] = [item for item in items if item not in without]
        config.hook.pytest_deselected(items=without)


def _is_wanted(item: pytest.Item, config: pytest.Config) -> bool:
    if config.getoption("--full") or not any(_holds_for(marker, item) for marker in item.iter_markers("full")):
        return True
    return zlib.crc32(item.nodeid.encode()) % FULL_PARTS == config.getoption("--full-part")


def _holds_for(full: pytest.Mark, item: pytest.Item) -> bool:
    return not full.args or item.callspec.params["target"].backend in full.args


def _targets_of(test: pytest.Item, targets: list[Target]) -> list[Target]:
    only = test.get_closest_marker("only")
    if only is not None:
        targets = [target for target in targets if target.backend in only.args]
    if test.get_closest_marker("not_interpreted"):
        targets = [target for target in targets if not target.interpreted]
    if test.get_closest_marker("one_isa"):
        targets = list({target.backend: target for target in reversed(targets)}.values())[::-1]
    return targets


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of the passed tests belong to each target."""
    passed = [report.nodeid for report in terminalreporter.getreports("passed") if report.when == "call"]
    counts = {str(target): sum(_belongs(nodeid, target) for nodeid in passed) for target in TARGETS}
    terminalreporter.write_line("passed per target: " + ", ".join(f"{name} {n}" for name, n in counts.items()))


def _belongs(nodeid: str, target: Target) -> bool:
    return re.search(rf"[\[-]{re.escape(str(target))}[\]-]", nodeid) is not None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_default() -> Iterator[None]:
    """Models that ask for no backend run on the reference, so that no test hangs on what happens to be fastest."""
    with pvt_fast.use_backend("reference"):
        yield


@pytest.fixture
def add_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Backend], None]]:
    """Registers a backend for the test, or puts it in place of the one that has its name."""

    def add(backend: Backend) -> None:
        module = ModuleType(f"tests_{backend.name}_backend")
        module.BACKEND = backend
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(dispatch.ORDER, backend.name, module.__name__)
        dispatch.loaded.cache_clear()

    yield add
    dispatch.loaded.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Halves of blocks that ran on the ops, in order."""
    log: list[str] = []

    def run(self, block, args, kwargs, run=FusedBlock.run):
        result = run(self, block, args, kwargs)
        log.extend(() if result is None else self.halves)
        return result

    monkeypatch.setattr(FusedBlock, "run", run)
    return log


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that pvt_fast allocates without initialising it is full of NaN: a value never written shows."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] == "pvt_fast" and tensor.is_floating_point():
                tensor.fill_(torch.nan)
            return tensor

        return allocate_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
