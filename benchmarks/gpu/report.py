"""The results of `gpu.py`, which merge over runs, the targets, and the report of both: gpu.json, gpu.md and gpu.png.

`Results` are three kinds of rows, each with `machine` (the GPU), `origin` (driver and versions), `date` and `revision`
(of the package's sources). `models`: as in `..report`, a contender's cell holding `peak` bytes besides. `kernels`: one
case's `ceilings` and `launches` (see `.kernels`). `checks`: `phase`, `what`, `outcome`, `told`, `lines`. `unmeasured`:
what the last run had no time for. Ratios are of times within a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from .. import report
from ..case import Case
from ..report import Row, table
from .plan import MODELS, Step

# Ways to run pvt_fast; the faster counts as ours. REPEAT is the first once more, in another process.
OURS, REPEAT = ("captured", "eager"), "again"
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
IMAGES_TARGET = (Case("pvt_v2_b2", 256, 224, "bf16"), "H200", 33_000)  # images/s on that GPU


@dataclass
class Results:
    """Everything measured so far into one folder."""

    models: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def add(self, kind: str, row: Row) -> None:
        """Put a row of "models", "kernels" or "checks" in the place of an earlier one of the same."""
        setattr(self, kind, report.merge(getattr(self, kind), [row], check_key if kind == "checks" else model_key))

    def forget(self, machine: str, step: Step) -> None:
        """Drop the check that tells of an earlier failure of the step."""
        self.checks = [check for check in self.checks if check_key(check) != (machine, step.phase, step.what)]

    def hold(self, step: Step, revision: str) -> bool:
        """Whether the step was done on these sources: its check passed, or all its contenders were timed or failed."""
        rows = self.checks if step.case is None else getattr(self, step.phase)
        for row in (row for row in rows if row["revision"] == revision):
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


def model_key(row: Row) -> tuple:
    return (row["machine"], row["size"], row["batch"], row["model"], row["dtype"])


def check_key(row: Row) -> tuple:
    return (row["machine"], row["phase"], row["what"])


def ours(row: Row) -> str | None:
    """The faster way to run pvt_fast; None where none was right."""
    return next((contender for contender in report.right(row) if contender in OURS), None)


def speedup(row: Row) -> float | None:
    """The time of the baseline, the fastest of timm's, over ours."""
    mine, best = ours(row), report.best_peer(row)
    return None if mine is None or best is None else report.ratio(row, best, mine)


def memory_ratio(row: Row) -> float | None:
    """Our peak of memory over the baseline's."""
    mine, best = ours(row), report.best_peer(row)
    peaks = [row["contenders"][name]["peak"] if name else None for name in (mine, best)]
    return None if None in peaks else peaks[0] / peaks[1]


def noise(row: Row) -> float | None:
    """How far two measurements of the same version lie apart, as a share of the time."""
    times = report.right(row)
    return abs(times[REPEAT] / times[OURS[0]] - 1) if REPEAT in times and OURS[0] in times else None


def verdict(row: Row) -> str:
    wanted, reached = TARGETS.get(case_of(row)), speedup(row)
    if wanted is None or reached is None:
        return "-"
    must, goal = wanted
    met = "goal met" if reached >= goal else "must met" if reached >= must else "**missed**"
    return f"{must:g}/{goal:g} {met}"


_NOTE = (
    "Median ms of a call over bursts of calls, in turns; inputs rotate, data are random. `ours` is the faster of CUDA "
    "graph (captured) and single launches (eager). Columns of timm's: their time over ours. Baseline: the fastest of "
    "timm's. Noise: the captured graph against itself in another process. Memory: our peak of bytes in tensors "
    f"(weights, captures and activations) over the baseline's, to be at most {MEMORY_TARGET:g}."
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
    for machine, group in groupby(results.models, key=lambda row: row["machine"]):
        rows = list(group)
        sections += [f"## {machine}: whole models", _origins(rows), _NOTE, _summary(rows), _figures(rows)]
    for row in results.kernels:
        sections += [f"## {row['machine']}: kernels of {report.name(row)}", _origins([row]), _kernels(row)]
    if results.unmeasured:
        sections += ["## Not measured: out of time", "\n".join(f"- {what}" for what in results.unmeasured)]
    return "\n\n".join(sections) + "\n"


def _origins(rows: list[Row]) -> str:
    return "\n".join(dict.fromkeys(f"- {row['date']}, sources {row['revision']}: {row['origin']}" for row in rows))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary(rows: list[Row]) -> str:
    peers, lines = report.peers(rows), []
    for row in rows:
        mine, memory = ours(row), memory_ratio(row)
        ms = row["contenders"][mine]["ms"] if mine else None
        over = "" if memory is None or memory <= MEMORY_TARGET else " **missed**"
        lines.append(
            [
                report.name(row),
                "-" if ms is None else f"{ms:.3f} ({mine})",
                _images(row, ms),
                *(_peer(row, peer, mine) for peer in peers),
                report.best_peer(row) or "-",
                _number(speedup(row), ".2f"),
                verdict(row),
                _number(memory, ".2f") + over,
                _number(noise(row), ".1%"),
                row["date"],
            ]
        )
    heading = ["case", "ours ms", "images/s", *peers, "baseline", "ratio", "must/goal", "memory", "noise", "measured"]
    return table(heading, lines)


def _images(row: Row, ms: float | None) -> str:
    """Images a second, and whether they are as many as wanted where that was said."""
    reached = ms and row["batch"] / ms * 1e3
    case, gpu, wanted = IMAGES_TARGET
    if reached is None or case_of(row) != case or gpu not in row["machine"]:
        return _number(reached, ",.0f")
    return f"{reached:,.0f} of {wanted:,}, {'met' if reached >= wanted else '**missed**'}"


def _peer(row: Row, peer: str, mine: str | None) -> str:
    cell = row["contenders"].get(peer)
    if cell is None or mine is None or "failure" in cell:
        return "-"
    return "**wrong**" if report.is_wrong(row, peer) else f"{report.ratio(row, peer, mine):.2f}"


def _figures(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for contender, cell in row["contenders"].items():
            if "failure" in cell:
                lines.append([report.name(row), contender, *["-"] * 6, f"did not run: {cell['failure']}"])
                continue
            lines.append(
                [
                    report.name(row),
                    contender,
                    f"{cell['ms']:.3f}",
                    f"{cell['ms_10']:.3f}-{cell['ms_90']:.3f}",
                    f"{row['gflop'] / cell['ms']:.1f}",
                    _number(cell["peak"] and cell["peak"] / 2**20, ",.0f"),
                    f"{cell['error']:.1e}",
                    f"{row['bound']:.1e}",
                    "**wrong**" if report.is_wrong(row, contender) else "",
                ]
            )
    heading = ["case", "contender", "ms", "10-90 %", "TFLOP/s", "peak MiB", "error", "parity bound", "note"]
    return table(heading, lines)


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


_VIEW = report.View(
    panel=lambda row: f"{row['machine']}; dotted: the ratios that the baseline must have, and the goal",
    ours=lambda row: ours(row) or "",
    marks=lambda row: TARGETS.get(case_of(row), ()),
)


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
            report.chart(drawn, folder / "gpu.png", _VIEW)
    except ImportError as error:
        tell(f"gpu.png was not drawn: {error}")
