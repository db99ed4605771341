"""The results of `gpu.py`, which merge over runs, the targets, and what is derived from both.

`Results` are three kinds of rows, each with `machine` (the GPU), `origin` (driver and versions), `date` and `revision`
(of the package's sources). `models`: as in `report`, a contender's cell holding `peak` and `reserved` bytes besides.
`kernels`: one case's `ceilings` and `launches` (see `gpu_kernels`). `checks`: `phase`, `what`, `outcome`, `told`,
`lines`. `unmeasured`: what the last run had no time for. Ratios are of times within a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import report
from case import Case
from gpu_plan import Step
from report import Row

# Ways to run pvt_fast; the faster counts as ours. REPEAT is the first once more, in another process.
OURS, REPEAT = ("captured", "eager"), "again"
OUT_OF_TIME = "not measured: out of time"

# Baseline's time over ours in bf16, (must, goal), by (batch, size).
TARGETS: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (1, 224): dict.fromkeys(("b0", "b1", "b2", "b2_li", "b3", "b4", "b5"), (1.5, 2.0)),
    (32, 224): {
        "b0": (1.5, 1.9),
        **dict.fromkeys(("b1", "b2", "b2_li"), (1.4, 1.8)),
        **dict.fromkeys(("b3", "b4"), (1.25, 1.5)),
        "b5": (1.15, 1.4),
    },
    (256, 224): {
        **dict.fromkeys(("b0", "b2_li"), (1.6, 2.0)),
        **dict.fromkeys(("b1", "b2"), (1.5, 1.8)),
        **dict.fromkeys(("b3", "b4"), (1.35, 1.6)),
        "b5": (1.2, 1.5),
    },
    (8, 512): {
        "b0": (1.5, 1.8),
        **dict.fromkeys(("b1", "b2"), (1.4, 1.7)),
        "b2_li": (1.5, 1.9),
        **dict.fromkeys(("b3", "b4"), (1.3, 1.5)),
        "b5": (1.15, 1.4),
    },
    (8, 1024): {
        **dict.fromkeys(("b0", "b1", "b2"), (1.3, 1.5)),
        "b2_li": (1.5, 1.9),
        **dict.fromkeys(("b3", "b4"), (1.2, 1.4)),
        "b5": (1.15, 1.3),
    },
}
KINDS = ("models", "kernels", "checks")
MEMORY_TARGET = 0.7  # peak memory, of the baseline's
ABSOLUTE_TARGET = (Case("pvt_v2_b2", 256, 224, "bf16"), "H200", 33_000)  # images/s on that GPU


@dataclass
class Results:
    """Everything measured so far into one folder."""

    models: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def add(self, kind: str, row: Row) -> None:
        """Put a row of "models", "kernels" or "checks" in the place of an earlier one of the same."""
        key = check_key if kind == "checks" else model_key
        setattr(self, kind, report.merge(getattr(self, kind), [row], key))

    def forget(self, machine: str, step: Step) -> None:
        """Drop the check that tells of an earlier failure of the step."""
        self.checks = [c for c in self.checks if check_key(c) != (machine, step.phase, step.what)]

    def lacking(self, step: Step, revision: str) -> list[str]:
        """What of the step was not measured on these sources: contenders, or its phase; nothing if all was."""
        whole = list(step.contenders) or [step.phase]
        current = {kind: [row for row in getattr(self, kind) if row["revision"] == revision] for kind in KINDS}
        if step.case is None:
            passed = [(c["phase"], c["what"]) for c in current["checks"] if c["outcome"] == "passed"]
            return [] if (step.phase, step.what) in passed else whole
        row = next((row for row in current[step.phase] if case_of(row) == step.case), None)
        if row is None or step.phase == "kernels":
            return whole if row is None else []
        untimed = {"failure": OUT_OF_TIME}
        return [c for c in whole if row["contenders"].get(c, untimed).get("failure") == OUT_OF_TIME]


def case_of(row: Row) -> Case:
    return Case(row["model"], row["batch"], row["size"], row["dtype"])


def model_key(row: Row) -> tuple:
    return (row["machine"], row["size"], row["batch"], row["model"], row["dtype"])


def check_key(row: Row) -> tuple:
    return (row["machine"], row["phase"], row["what"])


def target(case: Case) -> tuple[float, float] | None:
    """(must, goal) of the ratio to the baseline; None where nothing was promised."""
    if case.dtype != "bf16":
        return None
    return TARGETS.get((case.batch, case.size), {}).get(case.model.removeprefix("pvt_v2_"))


def ours(row: Row) -> str | None:
    """The faster way to run pvt_fast; None where none was right."""
    return next((contender for contender in report.right(row) if contender in OURS), None)


def baseline(row: Row) -> str | None:
    """The fastest of timm's."""
    return report.best_peer(row)


def speedup(row: Row) -> float | None:
    """The baseline's time over ours."""
    mine, best = ours(row), baseline(row)
    return None if mine is None or best is None else report.ratio(row, best, mine)


def memory_ratio(row: Row) -> float | None:
    """Our peak of memory over the baseline's."""
    mine, best = ours(row), baseline(row)
    peaks = [row["contenders"][name].get("peak") if name else None for name in (mine, best)]
    return None if None in peaks else peaks[0] / peaks[1]


def noise(row: Row) -> float | None:
    """How far two measurements of the same version lie apart, as a share of the time."""
    times = report.right(row)
    return abs(times[REPEAT] / times[OURS[0]] - 1) if REPEAT in times and OURS[0] in times else None


def verdict(row: Row) -> str:
    wanted, reached = target(case_of(row)), speedup(row)
    if wanted is None or reached is None:
        return "-"
    must, goal = wanted
    met = "goal met" if reached >= goal else "must met" if reached >= must else "**missed**"
    return f"{must:g}/{goal:g} {met}"


def load(folder: Path) -> Results:
    """Results of earlier runs into that folder."""
    path = folder / "gpu.json"
    return Results(**json.loads(path.read_text())) if path.exists() else Results()
