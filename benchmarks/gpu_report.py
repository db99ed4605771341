"""The report of `gpu.py`: results that merge over runs, the targets, and what is derived from both.

`Results` are three kinds of rows, each with `machine` (the GPU), `origin` (driver and versions), `date` and `revision`
(of the package's sources). `models`: as in `report`, a contender's cell holding `peak` and `reserved` bytes besides.
`kernels`: one case's `ceilings` and `launches` (see `gpu_kernels`). `checks`: `phase`, `what`, `outcome`, `told`,
`lines`. `unmeasured`: what the last run had no time for. Ratios are of times within a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import report
from case import Case
from gpu_plan import Step
from report import Row, table

# Ways to run pvt_fast; the faster counts as ours. REPEAT is the first once more, in another process.
OURS, REPEAT = ("captured", "eager"), "again"
ALL_OURS = (*OURS, REPEAT)
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
    return report.best_peer(row, ALL_OURS)


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


def markdown(results: Results) -> str:
    sections = ["# pvt_fast on GPUs", *_check_section(results.checks)]
    for machine, group in groupby(results.models, key=lambda row: row["machine"]):
        rows = list(group)
        sections += [f"## {machine}: whole models", _origins(rows), _MODELS_NOTE, table(*_summary(rows))]
        sections += [*_absolute(rows), table(*_figures(rows))]
    for row in results.kernels:
        sections += [f"## {row['machine']}: kernels of {report.name(row)}", _origins([row])]
        sections += [_ceilings(row["ceilings"]), table(*kernel_table(row))]
    if results.unmeasured:
        sections.append("## Not measured: out of time")
        sections.append("\n".join(f"- {what}" for what in results.unmeasured))
    return "\n\n".join(sections) + "\n"


_MODELS_NOTE = (
    "Median ms of a call over bursts of calls, in turns; inputs rotate, data are random. `ours` is the faster of CUDA "
    "graph (captured) and single launches (eager). Columns of timm's: their time over ours. Baseline: the fastest of "
    "timm's. Noise: the captured graph against itself in another process. Memory: our peak of bytes in tensors "
    f"(weights, captures and activations) over the baseline's, to be at most {MEMORY_TARGET:g}."
)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _summary(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    peers = list(dict.fromkeys(c for row in rows for c in row["contenders"] if c not in ALL_OURS))
    lines = []
    for row in rows:
        mine, best = ours(row), baseline(row)
        ms = row["contenders"][mine]["ms"] if mine else None
        memory = memory_ratio(row)
        over = "" if memory is None or memory <= MEMORY_TARGET else " **missed**"
        lines.append(
            [
                report.name(row),
                "-" if ms is None else f"{ms:.3f} ({mine})",
                _number(ms and row["batch"] / ms * 1e3, ",.0f"),
                *(_peer(row, peer, mine) for peer in peers),
                best or "-",
                _number(speedup(row), ".2f"),
                verdict(row),
                _number(memory, ".2f") + over,
                _number(noise(row), ".1%"),
                row["date"],
            ]
        )
    heading = ["case", "ours ms", "images/s", *peers, "baseline", "ratio", "must/goal", "memory", "noise", "measured"]
    return heading, lines


def _peer(row: Row, peer: str, mine: str | None) -> str:
    cell = row["contenders"].get(peer)
    if cell is None or "failure" in cell:
        return "-"
    if report.is_wrong(row, peer):
        return "**wrong**"
    return "-" if mine is None else f"{report.ratio(row, peer, mine):.2f}"


def _figures(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        for contender, cell in row["contenders"].items():
            if "failure" in cell:
                lines.append([report.name(row), contender, *["-"] * 7, f"did not run: {cell['failure']}"])
                continue
            memory = [_number(cell[kind] and cell[kind] / 2**20, ",.0f") for kind in ("peak", "reserved")]
            lines.append(
                [
                    report.name(row),
                    contender,
                    f"{cell['ms']:.3f}",
                    f"{cell['ms_10']:.3f}-{cell['ms_90']:.3f}",
                    f"{row['gflop'] / cell['ms']:.1f}",
                    *memory,
                    f"{cell['error']:.1e}",
                    f"{row['bound']:.1e}",
                    "**wrong**" if report.is_wrong(row, contender) else "",
                ]
            )
    heading = ["case", "contender", "ms", "10-90 %", "TFLOP/s", "peak MiB", "reserved MiB", "error", "parity bound"]
    return [*heading, "note"], lines


def _absolute(rows: list[Row]) -> list[str]:
    case, gpu, wanted = ABSOLUTE_TARGET
    for row in rows:
        mine = ours(row)
        if case_of(row) == case and gpu in row["machine"] and mine:
            reached = case.batch / row["contenders"][mine]["ms"] * 1e3
            return [f"{case}: {reached:,.0f} images/s of {wanted:,}, {'met' if reached >= wanted else '**missed**'}."]
    return []


def kernel_table(row: Row) -> tuple[list[str], list[list[str]]]:
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
    return [*heading, "measured/roofline"], lines


def _ceilings(ceilings: dict[str, Any]) -> str:
    return (
        f"Each launch alone, the L2 cache overwritten before it, its arguments those of the forward's like launches in "
        f"turn. Measured in the same process: copy {ceilings['copy_gbs']:.0f} GB/s, bf16 product "
        f"{ceilings['product_tflops']:.0f} TFLOP/s; an empty launch takes {ceilings['floor_us']:.1f} us and is part of "
        f"every time. Lanes: {ceilings['processors']} x 128 at {ceilings['clock_ghz']:.3f} GHz "
        f"({ceilings['clock_source']})."
    )


def _origins(rows: list[Row]) -> str:
    return "\n".join(dict.fromkeys(f"- {row['date']}, sources {row['revision']}: {row['origin']}" for row in rows))


def _check_section(checks: list[Row]) -> list[str]:
    if not checks:
        return []
    lines = [[c["phase"], c["what"], c["outcome"], c["told"], c["machine"], c["date"]] for c in checks]
    details = [
        f"Last lines of {c['phase']} {c['what']} on {c['machine']}:\n\n```\n" + "\n".join(c["lines"]) + "\n```"
        for c in checks
        if c["outcome"] == "failed" and c["lines"]
    ]
    return ["## Checks", table(["phase", "what", "outcome", "told", "GPU", "date"], lines), *details]


_VIEW = report.View(
    panel=lambda row: f"{row['machine']}; dotted: the ratios that the baseline must have, and the goal",
    ours=lambda row: ours(row) or "",
    all_ours=ALL_OURS,
    marks=lambda row: target(case_of(row)) or (),
)


def load(folder: Path) -> Results:
    """Results of earlier runs into that folder."""
    path = folder / "gpu.json"
    return Results(**json.loads(path.read_text())) if path.exists() else Results()


def save(results: Results, folder: Path, told: Callable[[str], None] = print) -> None:
    """gpu.json, gpu.md and, where matplotlib is installed and there is something to draw, gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(results))
    drawn = [row for row in results.models if speedup(row) is not None]
    try:
        if drawn:
            report.chart(drawn, folder / "gpu.png", _VIEW)
    except ImportError as error:
        told(f"gpu.png was not drawn: {error}")
