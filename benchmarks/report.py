"""The report of whole-model comparisons: rows that merge over runs, and what is derived from them.

A row is one case measured in one run: `machine`, `threads` (0 on a GPU), the fields of the case, `date`, `versions`,
`gflop` of one call, `peaks` in GFLOP/s and GB/s (empty where they were not measured), `bound` of the error that the
parity rule allows, and `contenders`: for each `ms`, `ms_10`, `ms_90`, `calls`, `error`, `note`, or only `failure`.
Ratios are of times within a row, to those of pvt_fast; times of different rows do not compare.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .case import Case

Row = dict[str, Any]

OURS = "pvt_fast"
# The ways to run it on a GPU, of which the faster counts as ours.
OURS_ON_GPU = ("captured", "eager")
# All ways to run pvt_fast, none of which is a peer. "again" is "captured" in another process, which shows the noise.
ALL_OURS = (OURS, "pvt_fast_compiled", *OURS_ON_GPU, "again")
DTYPES = ("fp32", "bf16")
# A contender that errs by this many times what the parity rule allows computes something else: its time counts nothing.
WRONG_FACTOR = 20


def name(row: Row) -> str:
    return str(Case(*(row[field] for field in Case._fields)))


def key(row: Row) -> tuple:
    """What makes two rows measurements of the same; and their order in a report."""
    return (row["machine"], row["threads"], row["model"], row["size"], row["batch"], DTYPES.index(row["dtype"]))


def merge(rows: list[Row], new: list[Row], key: Callable[[Row], tuple] = key) -> list[Row]:
    """Rows of earlier runs, those measured again replaced."""
    return sorted(({key(row): row for row in rows} | {key(row): row for row in new}).values(), key=key)


def is_wrong(row: Row, contender: str) -> bool:
    return not row["contenders"][contender]["error"] <= WRONG_FACTOR * row["bound"]


def ours(row: Row) -> str | None:
    """The contender that others are compared with; None where all of ours failed or were wrong."""
    return OURS if OURS in row["contenders"] else next((name for name in right(row) if name in OURS_ON_GPU), None)


def ratio(row: Row, contender: str) -> float | None:
    """How many times as long as pvt_fast; None without a time of pvt_fast."""
    mine = ours(row)
    return None if mine is None else row["contenders"][contender]["ms"] / row["contenders"][mine]["ms"]


def right(row: Row) -> dict[str, float]:
    """Milliseconds of the contenders that answered and were right, fastest first."""
    timed = {c: cell["ms"] for c, cell in row["contenders"].items() if "ms" in cell and not is_wrong(row, c)}
    return dict(sorted(timed.items(), key=lambda item: item[1]))


def peers(rows: Iterable[Row]) -> list[str]:
    """The contenders that are not ours, in the order in which the rows name them."""
    return list(dict.fromkeys(name for row in rows for name in row["contenders"] if name not in ALL_OURS))


def best_peer(row: Row) -> str | None:
    """The fastest peer of those whose answer is right."""
    return next((contender for contender in right(row) if contender not in ALL_OURS), None)


def gflops(row: Row, contender: str) -> float:
    return row["gflop"] / (row["contenders"][contender]["ms"] / 1e3)


def percent_of_peak(row: Row, contender: str) -> float | None:
    return 100 * gflops(row, contender) / row["peaks"][row["dtype"]] if row["peaks"] else None


def markdown(rows: list[Row], extra: Mapping[str, Callable[[Row], str]] = MappingProxyType({})) -> str:
    """Per machine and number of threads: a table of medians, with extra columns, and one of every figure."""
    sections = []
    for title, group in groupby(rows, key=_where):
        of_machine = list(group)
        sections.append(f"## {title}")
        sections.append("\n".join(origin(of_machine)))
        sections.append(
            "Median ms of a call, and in brackets how many times as long as pvt_fast it took; `% of peak` is that of "
            "pvt_fast's arithmetic."
        )
        sections.append(table(*_medians(of_machine, extra)))
        sections.append(table(*_figures(of_machine)))
    return "\n\n".join(sections) + "\n"


def where(machine: str, threads: int) -> str:
    return f"{machine}, {threads} thread{'s' if threads > 1 else ''}" if threads else machine


def _where(row: Row) -> str:
    return where(row["machine"], row["threads"])


def origin(rows: list[Row]) -> list[str]:
    """Lines of what the rows were measured with: versions by day, and the machine's peaks."""
    lines = {}
    for row in rows:
        versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        lines.setdefault(f"- {row['date']}: {versions}", None)
    for unit, figures in (("GFLOP/s", DTYPES), ("GB/s", ("read",))):
        for figure in figures:
            values = [row["peaks"][figure] for row in rows if row.get("peaks")]
            if values:
                what = "memory read" if figure == "read" else f"peak {figure}"
                lines[f"- {what}: {min(values):.1f} to {max(values):.1f} {unit} over the rows"] = None
    return list(lines)


def _medians(rows: list[Row], extra: Mapping[str, Callable[[Row], str]]) -> tuple[list[str], list[list[str]]]:
    contenders = list(dict.fromkeys(contender for row in rows for contender in row["contenders"]))
    lines = []
    for row in rows:
        best = best_peer(row)
        lines.append(
            [
                name(row),
                *(_cell(row, contender) for contender in contenders),
                "-" if best is None else f"{best} {_number(ratio(row, best))}",
                *(show(row) for show in extra.values()),
                "-" if (mine := ours(row)) is None else _percent(row, mine),
                row["date"],
            ]
        )
    return ["case", *contenders, "best peer", *extra, "% of peak", "measured"], lines


def _cell(row: Row, contender: str) -> str:
    cell = row["contenders"].get(contender)
    if cell is None or "failure" in cell:
        return "-"
    if is_wrong(row, contender):
        return f"**wrong**: error {cell['error']:.0e}"
    ms = _milliseconds(cell["ms"])
    return ms if contender == ours(row) else f"{ms} ({_number(ratio(row, contender))})"


def _figures(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        for contender, cell in row["contenders"].items():
            if "failure" in cell:
                lines.append([name(row), contender, *["-"] * 6, f"did not run: {cell['failure']}"])
                continue
            remark = f"**wrong**, at most {row['bound']:.1e} is right" if is_wrong(row, contender) else ""
            lines.append(
                [
                    name(row),
                    contender,
                    _milliseconds(cell["ms"], 2),
                    f"{_milliseconds(cell['ms_10'], 2)}-{_milliseconds(cell['ms_90'], 2)}",
                    _number(ratio(row, contender)),
                    f"{gflops(row, contender):.0f}",
                    _percent(row, contender),
                    f"{cell['error']:.1e}",
                    "; ".join(filter(None, (cell["note"], remark))),
                ]
            )
    return ["case", "contender", "ms", "10-90 %", "ratio", "GFLOP/s", "% of peak", "error", "note"], lines


def _percent(row: Row, contender: str) -> str:
    percent = percent_of_peak(row, contender)
    return "-" if percent is None else f"{percent:.0f}"


def table(heading: list[str], lines: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(heading), "|---" * len(heading) + "|", *map(line, lines)])


def chart(rows: list[Row], path: Path, marks: Callable[[Row], Sequence[float]] = lambda row: ()) -> None:
    """Bars of the peers' ratios, a group for each case, a panel for each machine and number of threads.

    marks: ratios to draw across a row's bars.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [list(group) for _, group in groupby(rows, key=_where)]
    drawn = peers(rows)
    bars = [len(panel) * len(drawn) for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(9, 0.24 * sum(bars) + 1.5 * len(panels)),
        height_ratios=bars,
        squeeze=False,
        layout="constrained",
    )
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        _draw_panel(axis, panel, drawn, marks)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(drawn), fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_panel(axis: Any, rows: list[Row], contenders: list[str], marks: Callable[[Row], Sequence[float]]) -> None:
    height = 0.8 / len(contenders)
    for place, peer in enumerate(contenders):
        shown = [
            (line + (place - (len(contenders) - 1) / 2) * height, ratio(row, peer), right(row)[peer])
            for line, row in enumerate(rows)
            if peer in right(row)
        ]
        drawn = axis.barh([y for y, _, _ in shown], [r for _, r, _ in shown], height, label=peer, color=f"C{place}")
        labels = [f"{r:.2f}  ({_milliseconds(ms)} ms)" for _, r, ms in shown]
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line at 1
        axis.bar_label(drawn, labels, padding=3, fontsize=7, bbox=plate)
    for line, row in enumerate(rows):
        axis.vlines(list(marks(row)), line - 0.45, line + 0.45, color="black", linestyle="dotted", linewidth=1)
    axis.axvline(1, color="black", linewidth=1)
    times = [_milliseconds(row["contenders"][ours(row)]["ms"]) for row in rows]
    labels = [f"{name(row)}\n{ms} ms" for row, ms in zip(rows, times, strict=True)]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    dotted = "; dotted: targets" if any(marks(row) for row in rows) else ""
    axis.set_xlabel(
        f"time as a multiple of pvt_fast's, which stands below each case; right of the line is slower{dotted}"
    )
    dates = sorted({row["date"] for row in rows})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    axis.set_title(f"{_where(rows[0])}, {when}", fontsize=9, loc="left")


def _milliseconds(ms: float, places: int = 1) -> str:
    return f"{ms:.{places if ms >= 1 else 3}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def load(folder: Path) -> list[Row]:
    """Rows of earlier runs into that folder."""
    path = folder / "cpu.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def save(rows: list[Row], folder: Path) -> None:
    """cpu.json, cpu.md and, where there is a peer to compare with, cpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (folder / "cpu.md").write_text(markdown(rows))
    if peers(rows):
        chart(rows, folder / "cpu.png")
