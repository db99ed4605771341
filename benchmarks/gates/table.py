"""The committed results of all compilations: table.json for programs, results/gates.md for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import triton

TABLE = Path(__file__).with_name("table.json")
SUMMARY = Path(__file__).parents[1] / "results" / "gates.md"

# What a compilation takes, in the order of a row; null where a target's machine code is not looked at for it.
COLUMNS = ("shared", "registers", "spills", "matrix", "matrix_in_loop", "load", "loop", "per_element")

Resources = dict[str, Any]


class Place(NamedTuple):
    """Where a compilation stands in the table."""

    target: str
    dtype: str
    kernel: str
    key: str  # Compilation.key(): what it was compiled from


Table = dict[Place, Resources]


def parse(text: str) -> Table:
    table: Table = {}
    for group, rows in json.loads(text).items():
        for key, values in rows.items():
            resources = {name: value for name, value in zip(COLUMNS, values, strict=True) if value is not None}
            table[Place(*group.split(), key)] = resources
    return table


def table_text(table: Table) -> str:
    """The table as a file: a row to a line, in the order of the table, so that a difference can be read."""
    groups: dict[str, list[str]] = {}
    for place, resources in table.items():
        values = [resources.get(name) for name in COLUMNS]
        groups.setdefault(" ".join(place[:3]), []).append(f"{json.dumps(place.key)}: {json.dumps(values)}")
    parts = [f"{json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n}" for group, rows in groups.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def summary(table: Table) -> list[str]:
    """Per target, dtype and kernel: how many were compiled, and the worst of their resources."""
    groups: dict[tuple[str, ...], list[Resources]] = {}
    for place, resources in table.items():
        groups.setdefault(place[:3], []).append(resources)
    lines = [
        "| target | dtype | kernel | compiled | shared KiB | registers | spilled | instructions per hidden element |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (target, dtype, kernel), group in groups.items():
        shared, registers, spilled = (max(row[name] for row in group) for name in ("shared", "registers", "spills"))
        counts = sorted({row["per_element"] for row in group if "per_element" in row})
        cells = (target, dtype, kernel.removesuffix("_kernel"), len(group), f"{shared / 1024:.0f}", registers, spilled)
        lines.append(f"| {' | '.join(map(str, cells))} | {', '.join(map(str, counts))} |")
    return lines


def summary_text(table: Table) -> str:
    return f"""# Gates

What the kernels of all published variants take at worst, compiled ahead of time by Triton {triton.__version__}; nothing
here ran. `make gpu-gates-update` writes it, from benchmarks/gates/table.json.

{chr(10).join(summary(table))}

{len(table)} kernels
"""
