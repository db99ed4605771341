"""What `gpu.py` does, in which order, and what fits into its minutes. Only the standard library is needed to know.

Steps come in the order of the phases, the most wanted models first. Whole models come in two waves: every case with the
contenders of CORE, so that each has a baseline early, then every case with all. What an earlier run of the same sources
left in the same folder comes last within its phase, so that runs one after the other complete the table.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..case import Case

PHASES = ("build", "tests", "sanitize", "models", "kernels")
MODELS = ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")
# Contenders in the order in which they are made ready: what takes a minute to compile comes last.
CORE = ("captured", "eager", "again", "timm", "compile")
CONTENDERS = (*CORE, "compile-no-graphs", "compile-flash", "compile-efficient", "compile-cudnn")

Shape = tuple[int, int]  # batch, image side
_OTHERS = ("b1", "b3", "b4", "b5")
# most wanted first
PRIORITY: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    ((1, 224), ("b0", "b2", "b2_li")),
    ((32, 224), ("b0", "b2", "b2_li")),
    ((256, 224), ("b2", "b0", "b2_li")),
    ((8, 512), ("b0", "b2", "b2_li")),
    *(((batch, size), _OTHERS) for batch, size in ((256, 224), (32, 224), (1, 224), (8, 512))),
    ((8, 1024), ("b2", "b2_li", "b0", *_OTHERS)),
)
SHAPES = tuple(dict.fromkeys(shape for shape, _ in PRIORITY))
# The kernels are timed alone on these, where they are asked for.
KERNEL_SHAPE, KERNEL_MODELS = (256, 224), ("b2", "b0", "b2_li")

# Seconds that a step is expected to take, none of them measured.
BUILD_S, TESTS_S, SANITIZE_S, KERNELS_S, REPORT_S = 90, 110, 40, 25, 5
# Of a case: processes, truth and rounds; then a contender by kind, the compiled ones for each block of the model.
CASE_S, EAGER_S, COMPILE_S, COMPILE_BLOCK_S = 20, 6, 30, 2
BLOCKS = {"b0": 8, "b1": 8, "b2": 16, "b2_li": 16, "b3": 28, "b4": 41, "b5": 52}
# A step may take this many times what is expected before it is ended.
PATIENCE = 2.5


class Step(NamedTuple):
    """One thing to do; `seconds` are expected, `case` and `contenders` are those of whole models and kernels."""

    phase: str
    what: str
    seconds: float
    case: Case | None = None
    contenders: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.phase} {self.what}"


class Place(NamedTuple):
    """Where things run; `backend` is that of pvt_fast."""

    device: str = "cuda"
    backend: str = "triton"


def steps(
    models: Sequence[str] = MODELS,
    shapes: Sequence[Shape] = SHAPES,
    phases: Sequence[str] = PHASES,
    held: Callable[[Step], bool] = lambda step: False,
) -> list[Step]:
    """Every step in order. `held`: whether earlier results hold a step's; models by short names."""
    cases = _cases(models, shapes)
    found = [Step("build", "setup.py build_ext --inplace", BUILD_S), Step("tests", "pytest", TESTS_S)]
    found += [Step("sanitize", tool, SANITIZE_S) for tool in ("memcheck", "racecheck")]
    for contenders, case in itertools.product((CORE, CONTENDERS), cases):
        seconds = CASE_S + sum(contender_seconds(name, case.model) for name in contenders)
        what = f"{case}: {', '.join(contenders) if contenders == CORE else 'again, with all'}"
        found.append(Step("models", what, seconds, case, contenders))
    shape = KERNEL_SHAPE if KERNEL_SHAPE in shapes else shapes[0]
    for model in [name for name in KERNEL_MODELS if name in models] or models:
        case = Case(f"pvt_v2_{model}", *shape, "bf16")
        found.append(Step("kernels", f"{case}: each launch alone", KERNELS_S, case))
    wanted = [step for step in found if step.phase in phases]
    return sorted(wanted, key=lambda step: (PHASES.index(step.phase), step.phase != "build" and held(step)))


def _cases(models: Sequence[str], shapes: Sequence[Shape]) -> list[Case]:
    """Every case asked for, most wanted first; shapes that are not in the table of priorities come last."""
    known = [(shape, model) for shape, names in PRIORITY for model in names]
    asked = list(itertools.product(shapes, models))
    ordered = [pair for pair in known if pair in asked] + [pair for pair in asked if pair not in known]
    return [Case(f"pvt_v2_{model}", *shape, "bf16") for shape, model in ordered]


def contender_seconds(name: str, model: str) -> float:
    """Until it is ready. Variants find most of what `compile` has tuned in Inductor's cache."""
    if not name.startswith("compile"):
        return EAGER_S
    full = COMPILE_S + COMPILE_BLOCK_S * BLOCKS[model.removeprefix("pvt_v2_")]
    return full if name == "compile" else full / 2


def schedule(planned: list[Step], left: Callable[[], float]) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that it may take when its turn comes; 0 if what is expected of it does not fit.

    left: seconds that remain. The first step on kernels and the report keep their time.
    """
    kept = next((step for step in planned if step.phase == "kernels"), None)
    for step in planned:
        if step.phase == "kernels":
            kept = None
        free = left() - REPORT_S - (kept.seconds if kept else 0)
        yield step, min(PATIENCE * step.seconds, free) if step.seconds <= free else 0.0


def dry_run(planned: list[Step], minutes: float) -> str:
    """What would run, when, and what would not fit; by the same schedule, each step taking what is expected."""
    lines: list[str] = []
    left_out: list[str] = []
    spent: list[float] = []
    for step, limit in schedule(planned, lambda: 60 * minutes - sum(spent)):
        told = f"   {step.phase:9}{step.what}  ({step.seconds / 60:.1f} min)"
        if limit:
            lines.append(f"{sum(spent) / 60:5.1f}{told}")
            spent.append(step.seconds)
        else:
            left_out.append(f"     {told}")
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
