"""The results of `gpu.py`, which merge over runs, and what is told of them: gpu.json, gpu.md and gpu.png.

`Results` are three kinds of rows, each with `machine` (the GPU), `date`, and `versions` of the driver, of packages and
of the sources. `models`: as in `..report`. `kernels`: one case's `ceilings` and `launches` (see `.kernels`). `checks`:
`phase`, `what`, `outcome`, `told`, `lines`. `unmeasured`: what the last run had no time for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import report
from ..case import Case
from ..report import Row, table
from .plan import MODELS, Step

OUT_OF_TIME = "not measured: out of time"

# Baseline's time over ours in bf16, (must, goal), by (batch, size) and model, in the order of MODELS.
_TARGETS = {
    (1, 224): [(1.5, 2.0)] * 7,
    (32, 224): [(1.5, 1.9), (1.4, 1.8), (1.4, 1.8), (1.4, 1.8), (1.25, 1.5), (1.25, 1.5), (1.15, 1.4)],
    (256, 224): [(1.6, 2.0), (1.5, 1.8), (1.5, 1.8), (1.6, 2.0), (1.35, 1.6), (1.35, 1.6), (1.2, 1.5)],
    (8, 512): [(1.5, 1.8), (1.4, 1.7), (1.4, 1.7), (1.5, 1.9), (1.3, 1.5), (1.3, 1.5), (1.15, 1.4)],
    (8, 1024): [(1.3, 1.5), (1.3, 1.5), (1.3, 1.5), (1.5, 1.9), (1.2, 1.4), (1.2, 1.4), (1.15, 1.3)],
}
TARGETS = {
    Case(f"pvt_v2_{model}", *shape, "bf16"): wanted
    for shape, by_model in _TARGETS.items()
    for model, wanted in zip(MODELS, by_model, strict=True)
}
MEMORY_TARGET = 0.7  # peak memory, of the baseline's


@dataclass
class Results:
    """Everything measured so far into one folder."""

    models: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def add(self, kind: str, row: Row) -> None:
        """Put a row of "models", "kernels" or "checks" in the place of an earlier one of the same."""
        setattr(self, kind, report.merge(getattr(self, kind), [row], check_key if kind == "checks" else report.key))

    def forget(self, machine: str, step: Step) -> None:
        """Drop the check that tells of an earlier failure of the step."""
        self.checks = [check for check in self.checks if check_key(check) != (machine, step.phase, step.what)]

    def hold(self, step: Step, revision: str) -> bool:
        """Whether the step was done on these sources: its check passed, or all its contenders were timed or failed."""
        rows = self.checks if step.case is None else getattr(self, step.phase)
        for row in (row for row in rows if row["versions"]["sources"] == revision):
            if step.case is None:
                if (row["phase"], row["what"], row["outcome"]) == (step.phase, step.what, "passed"):
                    return True
            elif case_of(row) == step.case:
                untimed = {"failure": OUT_OF_TIME}
                found = [row["contenders"].get(name, untimed) for name in step.contenders]
                return all(cell.get("failure") != OUT_OF_TIME for cell in found)
        return False


def case_of(row: Row) -> Case:
    return Case(row["model"], row["batch"], row["size"], row["dtype"])


def check_key(row: Row) -> tuple:
    return (row["machine"], row["phase"], row["what"])


def memory_ratio(row: Row) -> float | None:
    """Our peak of memory over that of the best peer."""
    cells = [row["contenders"].get(name, {}) for name in (report.ours(row), report.best_peer(row))]
    mine, best = (cell.get("peak") for cell in cells)
    return mine / best if mine and best else None


def speedup(row: Row) -> float | None:
    """The best peer's time over ours."""
    best = report.best_peer(row)
    return None if best is None else report.ratio(row, best)


def _verdict(row: Row) -> str:
    wanted, reached = TARGETS.get(case_of(row)), speedup(row)
    if wanted is None or reached is None:
        return "-"
    must, goal = wanted
    met = "goal met" if reached >= goal else "must met" if reached >= must else "**missed**"
    return f"{must:g}/{goal:g} {met}"


def _memory(row: Row) -> str:
    memory = memory_ratio(row)
    return "-" if memory is None else f"{memory:.2f}{' **missed**' if memory > MEMORY_TARGET else ''}"


def _images(row: Row) -> str:
    mine = report.ours(row)
    return "-" if mine is None else f"{row['batch'] / row['contenders'][mine]['ms'] * 1e3:,.0f}"


_NOTE = (
    "Times are of calls in bursts that go through several inputs; data are random. pvt_fast is the faster of a CUDA "
    "graph (captured) and single launches (eager); `again` is the graph in another process: its ratio shows the noise. "
    f"Memory: our peak of bytes in tensors over the best peer's, to be at most {MEMORY_TARGET:g}."
)


def markdown(results: Results) -> str:
    sections = ["# pvt_fast on GPUs"]
    if results.checks:
        told = [[c["phase"], c["what"], c["outcome"], c["told"], c["machine"], c["date"]] for c in results.checks]
        sections += ["## Checks", table(["phase", "what", "outcome", "told", "GPU", "date"], told)]
    for check in results.checks:
        if check["outcome"] == "failed" and check["lines"]:
            lines = "\n".join(check["lines"])
            sections.append(
                f"Last lines of {check['phase']} {check['what']} on {check['machine']}:\n\n```\n{lines}\n```"
            )
    if results.models:
        extra = {"must/goal": _verdict, "memory": _memory, "images/s": _images}
        sections += [_NOTE, report.markdown(results.models, extra).strip()]
    for row in results.kernels:
        sections += [
            f"## {row['machine']}: kernels of {report.name(row)}",
            "\n".join(report.origin([row])),
            _kernels(row),
        ]
    if results.unmeasured:
        sections += ["## Not measured: out of time", "\n".join(f"- {what}" for what in results.unmeasured)]
    return "\n\n".join(sections) + "\n"


def _kernels(row: Row) -> str:
    """A line for each distinct launch, those that take most of a forward first."""
    ceilings, lines = row["ceilings"], []
    for launch in sorted(row["launches"], key=lambda launch: -launch["count"] * launch["us"]):
        rate = launch["bytes"] / launch["us"] / 1e3
        lines.append(
            [
                launch["kernel"],
                launch["shape"],
                str(launch["count"]),
                f"{launch['us']:.1f}",
                f"{launch['count'] * launch['us']:.0f}",
                f"{launch['bytes'] / 1e6:.2f}",
                f"{rate:.0f}",
                f"{100 * rate / ceilings['copy_gbs']:.0f}",
                f"{launch['matrix_flop'] / 1e9:.2f}",
                f"{launch['roofline_us']:.1f} ({launch['bound_by']})",
                f"{launch['us'] / launch['roofline_us']:.2f}",
            ]
        )
    heading = ["kernel", "shape", "count", "us", "us in all", "MB", "GB/s", "% of copy", "GFLOP", "roofline us"]
    note = (
        f"Each launch alone, the L2 cache overwritten before it, its arguments those of the forward's like launches in "
        f"turn. Measured in the same process: copy {ceilings['copy_gbs']:.0f} GB/s, bf16 product "
        f"{ceilings['product_tflops']:.0f} TFLOP/s; an empty launch takes {ceilings['floor_us']:.1f} us and is part of "
        f"every time. Lanes: {ceilings['processors']} x 128 at {ceilings['clock_ghz']:.3f} GHz "
        f"({ceilings['clock_source']})."
    )
    return f"{note}\n\n{table([*heading, 'measured/roofline'], lines)}"


def load(folder: Path) -> Results:
    """Results of earlier runs into that folder."""
    path = folder / "gpu.json"
    return Results(**json.loads(path.read_text())) if path.exists() else Results()


def save(results: Results, folder: Path, tell: Callable[[str], None] = print) -> None:
    """gpu.json, gpu.md and, where matplotlib is installed and there is something to draw, gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(asdict(results), indent=1, default=str) + "\n")
    (folder / "gpu.md").write_text(markdown(results))
    drawn = [row for row in results.models if speedup(row) is not None]
    try:
        if drawn:
            report.chart(drawn, folder / "gpu.png", lambda row: TARGETS.get(case_of(row), ()))
    except ImportError as error:
        tell(f"gpu.png was not drawn: {error}")
