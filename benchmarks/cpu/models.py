"""Whole models on CPUs: pvt_fast against what else runs them, each contender in a process of its own, in turns.

    python benchmarks/cpu.py --models b0,b2,b2_li --batch 1,8 --size 224,512 --dtype fp32,bf16 \
        --peers timm,compile,onnxruntime,openvino --threads 2 --out results/
    python benchmarks/cpu.py --op --models b0,b2    # single ops against plain torch

Every contender's logits are held against float64 before it is timed, and the error stands beside the time. Rounds go
through the contenders one after the other, and through the machine's peaks, so that a change of clock or load meets all
alike; medians of all rounds count, and only ratios within one run compare. A folder given twice is added to: cases
measured again replace their rows.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import pvt_fast
from pvt_fast import testing
from pvt_fast.backend import cpp
from pvt_fast.config import VARIANTS, PVTConfig

from .. import report
from ..case import Case
from ..comparison import Truth, Worker, cells
from ..models import truth
from . import peak, single_ops
from .contenders import CONTENDERS, Build, contend

# The package whose version is told of a contender, besides torch.
PACKAGES = {"timm": "timm", "compile": "timm", "onnxruntime": "onnxruntime", "openvino": "openvino"}


def contenders_of(options: argparse.Namespace) -> list[str]:
    """Ours first, then the peers asked for."""
    return [report.OURS, *(peer for peer in options.peers if peer != report.OURS)]


def compare(case: Case, options: argparse.Namespace, peaks: bool, progress: Progress) -> report.Row:
    """Time one case; its row of the report."""
    meter = peak.Meter(cpp.isa(), options.threads)
    builds = {name: CONTENDERS[name] for name in contenders_of(options)}
    bound, cells = compete(builds, case, truth(case), options, progress, meter.measure if peaks else lambda: None)
    gflop = testing.model_flops(PVTConfig(**VARIANTS[case.model]), case.batch, (case.size, case.size)) / 1e9
    packages = ("torch", *(PACKAGES[name] for name in builds if name in PACKAGES))
    return row(case, options.threads, packages, gflop, meter.medians(), bound, cells)


def compete(
    builds: dict[str, Build],
    case: Any,
    truth: Truth,
    options: argparse.Namespace,
    progress: Progress,
    after_round: Callable[[], object] = lambda: None,
) -> tuple[float, dict[str, Any]]:
    """Check and time contenders, ours first: (largest error that the parity rule allows, cells of the row)."""
    task = progress.add_task(str(case), total=len(builds) + options.rounds)

    def finish_round() -> None:
        after_round()
        progress.advance(task)

    with ready(builds, case, truth, options.threads) as workers:
        progress.advance(task, len(workers))
        timed = cells(workers, options.rounds, options.seconds, after_round=finish_round)
    progress.remove_task(task)
    return testing.parity_bounds(*truth)["largest"], timed


@contextmanager
def ready(builds: dict[str, Build], case: Any, truth: Truth, threads: int) -> Iterator[list[Worker]]:
    """A worker of each contender, ours first, made ready one by one; ends the run where ours fails or is wrong."""
    workers: list[Worker] = []
    try:
        for name, build in builds.items():
            workers.append(Worker(name, contend, build, case, threads))
            workers[-1].prepare(truth)
            if workers[0].failure:
                raise SystemExit(f"pvt_fast failed on {case}: {workers[0].failure}")
        yield workers
    finally:
        for worker in workers:
            worker.server.close()


def row(
    case: Any,
    threads: int,
    packages: Iterable[str],
    gflop: float,
    peaks: dict[str, float],
    bound: float,
    cells: dict[str, Any],
) -> report.Row:
    """What was measured of a case, as `report` takes it."""
    return {
        "machine": cpu_name(),
        "threads": threads,
        **case._asdict(),
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in packages if find_spec(package)},
        "gflop": gflop,
        "peaks": peaks,
        "bound": bound,
        "contenders": cells,
    }


def cpu_name() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()} ({cpp.isa()})"


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def require_known(parser: argparse.ArgumentParser, *options: tuple[str, list[str], Iterable[str]]) -> None:
    """End with a usage error for a word of an option that is not among those known."""
    for option, given, known in options:
        for word in given:
            if word not in known:
                parser.error(f"{option} must be among {', '.join(known)}; got {word}")


def require_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Models by their whole names; a usage error for models, dtypes or peers that are not known."""
    options.models = [f"pvt_v2_{model.removeprefix('pvt_v2_')}" for model in options.models]
    require_known(
        parser,
        ("--models", options.models, pvt_fast.list_models()),
        ("--dtype", options.dtype, report.DTYPES),
        ("--peers", options.peers, CONTENDERS),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=words, default=["b0", "b2", "b2_li"], help="comma-separated, e.g. b0,b2_li")
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--size", type=numbers, default=[224], help="image side in pixels")
    parser.add_argument("--dtype", type=words, default=list(report.DTYPES))
    parser.add_argument("--peers", type=words, default=["timm", "compile"], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.25, help="per contender and round")
    parser.add_argument("--out", type=Path, help="folder that cpu.json, cpu.md and cpu.png are made or merged in")
    parser.add_argument("--op", action="store_true", help="single ops against plain torch, printed; without peers")
    options = parser.parse_args()
    require_cases(parser, options)
    if options.op and options.out:
        parser.error(f"--out must be left out with --op, which prints only; got {options.out}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    cases = [Case(*chosen) for chosen in itertools.product(options.models, options.batch, options.size, options.dtype)]
    try:
        peak.build()
        peaks = True
    except peak.Unavailable as error:
        console.print(f"The machine's peaks are not measured: {escape(str(error))}")
        peaks = False
    with Progress(console=console) as progress:
        if options.op:
            where = report.where(cpu_name(), options.threads)
            table = f"## {where}\n\n{single_ops.compare(cases, options, peaks, progress)}"
        else:
            rows = []
            for case in progress.track(cases, description="cases"):
                rows.append(compare(case, options, peaks, progress))
                if options.out:
                    report.save(report.merge(report.load(options.out), rows), options.out)
            table = report.markdown(rows)
    print(table)
