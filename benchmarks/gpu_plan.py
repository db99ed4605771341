"""What `gpu.py` does, in which order, and what fits into its minutes. Only the standard library is needed to know.

Steps come in the order of the phases. Whole models come in waves: every case with the contenders of CORE, so that each
has a baseline early, then every case with all that were asked for. What an earlier run of the same sources has left in
the same folder comes after what is new, its checks last of all, so that runs one after the other complete the table.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from case import Case

PHASES = ("build", "tests", "sanitize", "models", "kernels")
MODELS = ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")
# Contenders in the order in which they are made ready: what takes a minute to compile comes last.
CORE = ("captured", "eager", "again", "timm", "compile")
VARIANTS = ("compile-no-graphs", "compile-flash", "compile-efficient", "compile-cudnn")
CONTENDERS = CORE + VARIANTS

# (batch, size): models, most wanted first
PRIORITY: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((1, 224), ("b0", "b2", "b2_li")),
    ((32, 224), ("b0", "b2", "b2_li")),
    ((256, 224), ("b2", "b0", "b2_li")),
    ((8, 512), ("b0", "b2", "b2_li")),
    *(((batch, size), ("b1", "b3", "b4", "b5")) for batch, size in ((256, 224), (32, 224), (1, 224), (8, 512))),
    ((8, 1024), ("b2", "b2_li", "b0", "b1", "b3", "b4", "b5")),
)
SHAPES = tuple(dict.fromkeys(shape for shape, _ in PRIORITY))
# The kernels are timed alone on these, where they are asked for.
KERNEL_SHAPE = (256, 224)
KERNEL_MODELS = ("b2", "b0", "b2_li")

# Seconds that a step is expected to take, none of them measured; the pace of the first cases corrects those after.
BUILD_S, TESTS_S, SANITIZE_S, KERNELS_S, REPORT_S = 90, 110, 40, 25, 5
# Of a case: processes, truth and rounds; then a contender by kind, the compiled ones for each block of the model.
CASE_S, EAGER_S, COMPILE_S, COMPILE_BLOCK_S, VARIANT_SHARE = 20, 6, 30, 2, 0.5
BLOCKS = {"b0": 8, "b1": 8, "b2": 16, "b2_li": 16, "b3": 28, "b4": 41, "b5": 52}
# Bursts of each contender, of which the median counts.
FEWEST_ROUNDS = 5
# A step may take this many times what is expected before it is ended.
PATIENCE = 2.5


class Step(NamedTuple):
    """One thing to do; `seconds` are expected, `case` and `contenders` are those of whole models and kernels."""

    phase: str
    what: str
    seconds: float
    case: Case | None = None
    contenders: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        return PATIENCE * self.seconds


class Place(NamedTuple):
    """Where things run; `backend` is that of pvt_fast."""

    device: str = "cuda"
    backend: str = "triton"


class Request(NamedTuple):
    """What the command line asks for; models by short name, shapes as (batch, size)."""

    models: tuple[str, ...] = MODELS
    shapes: tuple[tuple[int, int], ...] = SHAPES
    dtype: str = "bf16"
    contenders: tuple[str, ...] = CONTENDERS
    phases: tuple[str, ...] = PHASES


# Whether earlier results hold a step's.
Done = Callable[[Step], bool]


def steps(request: Request, done: Done = lambda step: False) -> list[Step]:
    """Every step, in order."""
    checks = [Step("tests", "pytest --backend triton", TESTS_S)]
    checks += [Step("sanitize", tool, SANITIZE_S) for tool in ("memcheck", "racecheck")]
    found = [
        Step("build", "setup.py build_ext --inplace", BUILD_S),
        *(step for step in checks if not done(step)),
        *sorted(_model_steps(request), key=done),  # stable, False before True
        *sorted(_kernel_steps(request), key=done),
        *(step for step in checks if done(step)),
    ]
    return [step for step in found if step.phase in request.phases]


def _model_steps(request: Request) -> Iterator[Step]:
    core = tuple(name for name in request.contenders if name in CORE)
    waves = dict.fromkeys((core, request.contenders))
    for contenders, case in itertools.product(waves, cases(request)):
        seconds = CASE_S + sum(contender_seconds(name, case.model) for name in contenders)
        added = [name for name in contenders if name not in core]
        what = f"{case}: {'again, with ' if added else ''}{', '.join(added or contenders)}"
        yield Step("models", what, seconds, case, contenders)


def _kernel_steps(request: Request) -> Iterator[Step]:
    shape = KERNEL_SHAPE if KERNEL_SHAPE in request.shapes else request.shapes[0]
    for model in [name for name in KERNEL_MODELS if name in request.models] or request.models:
        case = Case(f"pvt_v2_{model}", *shape, request.dtype)
        yield Step("kernels", f"{case}: each launch alone", KERNELS_S, case)


def cases(request: Request) -> list[Case]:
    """Every case asked for, most wanted first; shapes that are not in the table of priorities come last."""
    known = [(shape, model) for shape, models in PRIORITY for model in models]
    asked = list(itertools.product(request.shapes, request.models))
    ordered = [pair for pair in known if pair in asked] + [pair for pair in asked if pair not in known]
    return [Case(f"pvt_v2_{model}", *shape, request.dtype) for shape, model in ordered]


def contender_seconds(name: str, model: str) -> float:
    """Until it is ready. Variants find most of what `compile` has tuned in Inductor's cache."""
    if not name.startswith("compile"):
        return EAGER_S
    full = COMPILE_S + COMPILE_BLOCK_S * BLOCKS[model.removeprefix("pvt_v2_")]
    return full if name == "compile" else VARIANT_SHARE * full


class Clock:
    """The minutes of a run: what is left, and how fast cases go against what was expected of them."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + 60 * minutes
        self._spent = self._expected = 0.0

    def left(self) -> float:
        """Seconds."""
        return self._end - self._now()

    def observe(self, step: Step, seconds: float) -> None:
        if step.phase == "models":
            self._spent += seconds
            self._expected += step.seconds

    def expected(self, step: Step) -> float:
        """Seconds of the step at the pace so far."""
        pace = self._spent / self._expected if self._expected else 1.0
        return step.seconds * pace if step.phase == "models" else step.seconds


def schedule(planned: list[Step], clock: Clock) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that it may take when its turn comes; 0 if what is expected of it does not fit.

    The first step on kernels and the report keep their time.
    """
    kept = next((step for step in planned if step.phase == "kernels"), None)
    for step in planned:
        if step.phase == "kernels":
            kept = None
        left = clock.left() - REPORT_S - (kept.seconds if kept else 0)
        yield step, min(step.limit, left) if clock.expected(step) <= left else 0.0


def dry_run(planned: list[Step], minutes: float) -> str:
    """What would run, when, and what would not fit; by the same schedule, each step taking what is expected."""
    lines: list[str] = []
    left_out: list[str] = []
    spent: list[float] = []
    for step, limit in schedule(planned, Clock(minutes, lambda: sum(spent))):
        if not limit:
            left_out.append(f"        {step.phase:9}{step.what}  ({step.seconds / 60:.1f} min)")
            continue
        lines.append(f"{sum(spent) / 60:5.1f}   {step.phase:9}{step.what}  ({step.seconds / 60:.1f} min)")
        spent.append(step.seconds)
    head = f"Would run within {minutes:g} minutes; times are expected, not measured. Minute, phase, step:"
    tail = ["Would not fit, and be reported as not measured: out of time:", *left_out] if left_out else []
    return "\n".join([head, *lines, *tail])


def sources_digest(root: Path) -> str:
    """12 digits of the package's Python sources: results of other sources are not taken for those of these."""
    hashed = hashlib.sha256()
    for folder in (root / "pvt_fast", root / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            hashed.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:12]
