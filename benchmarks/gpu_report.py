"""The report of `gpu.py`: gpu.json, gpu.md and gpu.png of its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import report
from gpu_results import (
    ABSOLUTE_TARGET,
    MEMORY_TARGET,
    Results,
    baseline,
    case_of,
    memory_ratio,
    noise,
    ours,
    speedup,
    target,
    verdict,
)
from report import Row, table


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
    peers = report.peers(rows)
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
    marks=lambda row: target(case_of(row)) or (),
)


def save(results: Results, folder: Path, told: Callable[[str], None] = print) -> None:
    """gpu.json, gpu.md and, where matplotlib is installed and there is something to draw, gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(asdict(results), indent=1, default=str) + "\n")
    (folder / "gpu.md").write_text(markdown(results))
    drawn = [row for row in results.models if speedup(row) is not None]
    try:
        if drawn:
            report.chart(drawn, folder / "gpu.png", _VIEW)
    except ImportError as error:
        told(f"gpu.png was not drawn: {error}")
