"""The report of training steps: rows that merge over runs, and what is derived from them.

A row is one case measured in one run, as in `..report`, but for: the fields of a `TrainCase`; `bound`, of the largest
error of the scaled gradients; `backward_gflop` of ours (None where nobody counted); and of each contender
`rounds_ms`, the median of each round, `backward_ms`, and `saved_bytes` that autograd keeps. A row of memory has for
each contender `peak_bytes` of a step above those before it, or `failure`, and `limit_bytes` that it was let take.

A ratio is how many times as fast as plain torch ours is: within each round, the faster of plain torch and torch.compile
over ours; the median of all rounds counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from pvt_fast.cli.timing import Spread, spread

from .. import report
from ..case import TrainCase
from ..report import OURS, Row
from .training import MODELS, PRECISIONS

# A contender that errs by this many times what the parity rule allows computes something else: its time counts nothing.
WRONG_FACTOR = 4
OUT_OF_MEMORY = "out of memory"
# What torch, C++ and the system say of it; 9 is the signal by which the system ends a process.
_SIGNS = ("can't allocate memory", "not enough memory", "MemoryError", "bad_alloc", "ended with status -9")


def case(row: Row) -> TrainCase:
    return TrainCase(*(row[field] for field in TrainCase._fields))


def key(row: Row) -> tuple:
    """What makes two rows measurements of the same; and their order in a report."""
    of = case(row)
    where = (row["machine"], row["threads"])
    return (*where, MODELS.index(of.model), of.height * of.width, of.batch, PRECISIONS.index(of.precision))


def is_wrong(row: Row, contender: str) -> bool:
    return not row["contenders"][contender]["error"] <= WRONG_FACTOR * row["bound"]


def best_peer(row: Row) -> str | None:
    """The fastest peer of those whose gradients are right."""
    cells = {name: cell for name, cell in row["contenders"].items() if name != OURS and "ms" in cell}
    return min((name for name in cells if not is_wrong(row, name)), key=lambda name: cells[name]["ms"], default=None)


def ratio(row: Row) -> Spread | None:
    """How many times as fast as the best peer; None without one or without a time of ours."""
    peer, mine = best_peer(row), row["contenders"][OURS]
    if peer is None or "ms" not in mine or is_wrong(row, OURS):
        return None
    rounds = zip(row["contenders"][peer]["rounds_ms"], mine["rounds_ms"], strict=True)
    return spread([theirs / ours / 1e3 for theirs, ours in rounds])  # a ratio for each millisecond of a spread


def slower(rows: Iterable[Row]) -> list[str]:
    """A line for every case that plain torch does faster, or that ours did not do, or not rightly."""
    lines = []
    for row in rows:
        mine, of = row["contenders"][OURS], ratio(row)
        if "failure" in mine:
            lines.append(f"{case(row)}: pvt_fast failed: {failure(mine)}")
        elif is_wrong(row, OURS):
            lines.append(f"{case(row)}: pvt_fast is wrong: error {mine['error']:.0e}")
        elif of is not None and of.ms < 1:
            lines.append(f"{case(row)}: {_spread(of)} times as fast as {best_peer(row)}")
    return lines


def failure(cell: dict[str, Any]) -> str:
    """Why a contender has no figures, in plain words."""
    return OUT_OF_MEMORY if any(sign in cell["failure"] for sign in _SIGNS) else cell["failure"]


def percent_of_peak(row: Row) -> float | None:
    """Of multiply-adds, by our backward."""
    mine = row["contenders"][OURS]
    if not row["peaks"] or row["backward_gflop"] is None or "backward_ms" not in mine:
        return None
    return 100 * row["backward_gflop"] / (mine["backward_ms"] / 1e3) / row["peaks"][case(row).computed_in]


# -- text -------------------------------------------------------------------------------------------------------------


def markdown(rows: list[Row], memory: list[Row]) -> str:
    """Per machine and number of threads: steps and what they keep, every figure, and the memory of a step."""
    sections = []
    for title, (steps, taken) in _by_machine(rows, memory).items():
        sections.append(f"## {title}")
        sections.append("\n".join(report.origin([*steps, *taken])))
        if steps:
            sections.append(
                "Median ms of a training step: zero_grad, forward, loss, backward, SGD. `plain` is timm's model, or "
                "transformers', as it comes, `compile` that under torch.compile; of transformers' model, `pvt_fast` is "
                "that after `accelerate_`. `ratio`: how many times as fast as the better of both pvt_fast is, the "
                "median of all rounds with the first and last decile. `autograd keeps`: MB between forward and "
                "backward, of pvt_fast and of plain torch. `% of peak`: multiply-adds of pvt_fast's backward, twice "
                "the forward's and the forward's again, which it replays."
            )
            sections.append(report.table(*_steps(steps)))
            sections.append(report.table(*_figures(steps)))
        if taken:
            sections.append(
                "MB of memory that a step takes at its peak above those before it, each in a process of its own. "
                "`probabilities kept`: softmax(q k^T) as a tensor, as in mmdet's code; here pvt_fast's reference."
            )
            sections.append(report.table(*_memory(taken)))
    return "\n\n".join(sections) + "\n"


def _by_machine(rows: list[Row], memory: list[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    for place, kind in enumerate((rows, memory)):
        for title, group in groupby(kind, key=lambda row: report.where(row["machine"], row["threads"])):
            found.setdefault(title, ([], []))[place].extend(group)
    return found


def _contenders(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["contenders"]))


def _steps(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    contenders = _contenders(rows)
    lines = []
    for row in rows:
        of, percent = ratio(row), percent_of_peak(row)
        lines.append(
            [
                str(case(row)),
                *(_cell(row, contender) for contender in contenders),
                "-" if of is None else f"{_spread(of)} of {best_peer(row)}",
                _kept(row),
                "-" if percent is None else f"{percent:.0f}",
                row["date"],
            ]
        )
    return ["case", *contenders, "ratio", "autograd keeps", "% of peak", "measured"], lines


def _cell(row: Row, contender: str) -> str:
    cell = row["contenders"].get(contender)
    if cell is None:
        return "-"
    if "failure" in cell:
        return OUT_OF_MEMORY if failure(cell) == OUT_OF_MEMORY else "-"
    return f"**wrong**: error {cell['error']:.0e}" if is_wrong(row, contender) else f"{cell['ms']:.1f}"


def _kept(row: Row) -> str:
    mine, theirs = (row["contenders"].get(name, {}).get("saved_bytes") for name in (OURS, "plain"))
    if mine is None or not theirs:
        return "-" if mine is None else f"{mine / 1e6:.1f}"
    return f"{mine / 1e6:.1f} / {theirs / 1e6:.1f} = {mine / theirs:.2f}"


def _figures(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        for contender, cell in row["contenders"].items():
            if "failure" in cell:
                lines.append([str(case(row)), contender, *["-"] * 4, f"did not run: {failure(cell)}"])
                continue
            remark = f"**wrong**, at most {row['bound']:.1e} is right" if is_wrong(row, contender) else ""
            lines.append(
                [
                    str(case(row)),
                    contender,
                    f"{cell['ms']:.2f}",
                    f"{cell['ms_10']:.2f}-{cell['ms_90']:.2f}",
                    f"{cell['backward_ms']:.2f}" if "backward_ms" in cell else "-",
                    f"{cell['error']:.1e}",
                    "; ".join(filter(None, (cell["note"], remark))),
                ]
            )
    return ["case", "contender", "ms", "10-90 %", "backward ms", "error", "note"], lines


def _memory(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    contenders = _contenders(rows)
    lines = [
        [
            str(case(row)),
            *(_taken(row["contenders"].get(contender)) for contender in contenders),
            "-" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 1e6:.0f}",
            row["date"],
        ]
        for row in rows
    ]
    return ["case", *contenders, "limit", "measured"], lines


def _taken(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return failure(cell) if "failure" in cell else f"{cell['peak_bytes'] / 1e6:.0f}"


def _spread(of: Spread) -> str:
    return f"{of.ms:.2f} ({of.ms_10:.2f}-{of.ms_90:.2f})"


# -- drawings ---------------------------------------------------------------------------------------------------------


def chart(rows: list[Row], memory: list[Row], path: Path) -> None:
    """For each machine and number of threads: bars of the ratios, a line at 1, and bars of memory by image size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: list[tuple[str, list[Row], Callable[[Any, list[Row]], None], float]] = []
    for title, (steps, taken) in _by_machine(rows, memory).items():
        if steps:
            panels.append((title, steps, _draw_ratios, 0.3 * len(steps)))
        if taken:
            panels.append((title, taken, _draw_memory, 0.18 * len(taken) * len(_contenders(taken))))
    inches = [height + 0.3 for *_, height in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(9, sum(inches) + 0.8 * len(panels)),
        height_ratios=inches,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, kind, draw, _) in zip(axes[:, 0], panels, strict=True):
        draw(axis, kind)
        axis.set_yticks(range(len(kind)), [str(case(row)) for row in kind], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_ratios(axis: Any, rows: list[Row]) -> None:
    for line, row in enumerate(rows):
        of = ratio(row)
        if of is None:
            axis.text(0, line, " no ratio", va="center", fontsize=7)
            continue
        reach = [[of.ms - of.ms_10], [of.ms_90 - of.ms]]
        axis.barh(line, of.ms, 0.7, xerr=reach, color="C0" if of.ms >= 1 else "C3", ecolor="0.3")
        axis.text(of.ms_90, line, f"  {of.ms:.2f} of {best_peer(row)}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xlabel("training steps: times as fast as the better of plain torch and torch.compile", fontsize=8)


def _draw_memory(axis: Any, rows: list[Row]) -> None:
    contenders = _contenders(rows)
    height = 0.8 / len(contenders)
    for place, contender in enumerate(contenders):
        y = [line + (place - (len(contenders) - 1) / 2) * height for line in range(len(rows))]
        cells = [row["contenders"].get(contender) for row in rows]
        taken = [0 if cell is None else cell.get("peak_bytes", 0) / 1e9 for cell in cells]
        drawn = axis.barh(y, taken, height, label=contender, color=f"C{place}")
        told = [
            failure(c) if c and "failure" in c else f"{t:.2f}" if c else "" for c, t in zip(cells, taken, strict=True)
        ]
        axis.bar_label(drawn, [text[:40] for text in told], padding=3, fontsize=7)
    axis.set_xlabel("memory of a training step at its peak, GB", fontsize=8)
    axis.legend(fontsize=7)


# -- files ------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of steps and of memory, of earlier runs into that folder."""
    path = folder / "train.json"
    if not path.exists():
        return [], []
    stored = json.loads(path.read_text())
    return stored["rows"], stored["memory"]


def save(rows: list[Row], memory: list[Row], folder: Path) -> None:
    """train.json, train.md and train.png, merged with what the folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = load(folder)
    rows, memory = (report.merge(old, new, key) for old, new in zip(earlier, (rows, memory), strict=True))
    (folder / "train.json").write_text(json.dumps({"rows": rows, "memory": memory}, indent=1) + "\n")
    (folder / "train.md").write_text(markdown(rows, memory))
    chart(rows, memory, folder / "train.png")


def medians(rounds: list[list[float]]) -> list[float]:
    """Milliseconds of each round."""
    return [1e3 * median(times) for times in rounds]
