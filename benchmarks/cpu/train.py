"""Training steps on CPUs: pvt_fast against plain torch and torch.compile, and the memory that a step takes.

    python benchmarks/train.py --out benchmarks/results                    # all cases, which takes hours
    python benchmarks/train.py --models b0,segformer_b0 --precision fp32   # some of them
    python benchmarks/train.py --cases b2:bf16:1:800x1344 --memory-cases '' --rounds 3

Every contender's gradients are held against float64 before its steps are timed; ours must keep the parity rule. Rounds
go through the contenders one after the other, each in a process of its own, and through the machine's peaks; medians of
all rounds count, and only ratios within one run compare. A folder given twice is added to: cases measured again replace
their rows. Ends with status 1 and a line for every case that plain torch, compiled or not, does faster than pvt_fast.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from pvt_fast import testing
from pvt_fast.backend import cpp
from pvt_fast.cli.timing import in_turns

from .. import report
from ..case import TrainCase
from ..comparison import Worker
from ..report import OURS, Row
from ..server import Failed, Server
from . import peak, train_report, training
from .models import require_known, row, words

CASES = [
    TrainCase(f"pvt_v2_{model}", precision, batch, 224, 224)
    for model, batch in (("b0", 8), ("b2", 4))
    for precision in training.PRECISIONS
] + [
    TrainCase("pvt_v2_b2_li", "fp32", 2, 512, 512),
    TrainCase("pvt_v2_b2", "fp32", 1, 800, 1344),
    TrainCase(training.SEGFORMER, "fp32", 2, 512, 512),
]
MEMORY_CASES = [
    TrainCase("pvt_v2_b2", "fp32", 1, height, width)
    for height, width in ((224, 224), (512, 512), (800, 1344), (1024, 2048))
]


def compare(
    case: TrainCase, options: argparse.Namespace, after_round: Callable[[], object] = lambda: None, builds=None
) -> Row:
    """Check and time a case; its row but for the peaks. A contender that fails, ours too, is told of in its cell."""
    builds = builds or {name: training.CONTENDERS[name] for name in (OURS, *options.peers)}
    scales, truth = training.truth(case)
    workers: list[Worker] = []
    rounds: dict[str, list[list[float]]] = {name: [] for name in builds}

    def burst(worker: Worker) -> list[float]:
        rounds[worker.name].append(worker.burst(options.seconds))
        return rounds[worker.name][-1]

    try:
        for name, build in builds.items():
            workers.append(Worker(name, training.contend, build, case, options.threads, scales))
            workers[-1].prepare(truth, options.limit)
        bursts = [lambda worker=worker: burst(worker) for worker in workers]
        times = in_turns(bursts, options.rounds, after_round=after_round)
        cells = {
            worker.name: _cell(worker, each, rounds[worker.name]) for worker, each in zip(workers, times, strict=True)
        }
    finally:
        for worker in workers:
            worker.server.close()
    bound = testing.parity_bounds(*truth)["largest"]
    made = row(case, options.threads, _packages(case), 0.0, {}, bound, cells)
    del made["gflop"]
    return made | {"backward_gflop": training.backward_gflop(case)}


def _cell(worker: Worker, times: list[float], rounds: list[list[float]]) -> dict:
    if worker.failure is None:
        try:
            backward = worker.server.ask("backward")
        except Failed as failed:
            worker.failure = str(failed)
        else:
            return worker.cell(times) | {"rounds_ms": train_report.medians(rounds), "backward_ms": 1e3 * backward}
    return worker.cell(times)


def weigh(case: TrainCase, options: argparse.Namespace) -> Row:
    """The memory that a step of each contender takes; its row."""
    limit = int(options.memory_limit * 1e9) if options.memory_limit else available_bytes()
    cells: dict[str, dict] = {}
    for name, build in training.in_memory(case).items():
        server = Server(training.take_memory, build, case, options.threads, limit)
        try:
            server.receive()
            cells[name] = {"peak_bytes": server.ask("peak")}
        except Failed as failed:
            cells[name] = {"failure": str(failed)}
        finally:
            server.close()
    made = row(case, options.threads, _packages(case), 0.0, {}, 0.0, cells)
    for field in ("gflop", "bound"):
        del made[field]
    return made | {"limit_bytes": limit}


def available_bytes() -> int:
    """Of memory, by /proc/meminfo, that a process can still take on this machine."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10


def _packages(case: TrainCase) -> tuple[str, ...]:
    return ("torch", "transformers" if case.model == training.SEGFORMER else "timm")


def cases_of(text: str) -> list[TrainCase]:
    """Cases from words like b0:fp32:8:224 or b2:bf16:1:800x1344: model, precision, batch, image."""
    return [_case(word) for word in words(text)]


def _case(word: str) -> TrainCase:
    found = re.fullmatch(r"(\w+):(\w+):([1-9]\d*):([1-9]\d*)(?:x([1-9]\d*))?", word)
    if found is None:
        raise argparse.ArgumentTypeError(f"a case must be model:precision:batch:height[xwidth], got {word!r}")
    model, precision, batch, height, width = found.groups()
    model = _whole_name(model)
    for what, value, known in (("model", model, training.MODELS), ("precision", precision, training.PRECISIONS)):
        if value not in known:
            raise argparse.ArgumentTypeError(f"a case's {what} must be among {', '.join(known)}; got {value}")
    return TrainCase(model, precision, int(batch), int(height), int(width or height))


def _whole_name(model: str) -> str:
    return model if model == training.SEGFORMER else f"pvt_v2_{model.removeprefix('pvt_v2_')}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    like = "comma-separated, each as b2:bf16:1:800x1344"
    parser.add_argument("--cases", type=cases_of, help=f"to time, {like} (default: {len(CASES)} cases)")
    parser.add_argument(
        "--memory-cases", type=cases_of, help=f"to weigh, {like} (default: those to time; b2 in four sizes)"
    )
    parser.add_argument("--models", type=words, default=[], help="only these of the cases, e.g. b0,segformer_b0")
    parser.add_argument("--precision", type=words, default=[], help=f"only these, of {', '.join(training.PRECISIONS)}")
    peers = [name for name in training.CONTENDERS if name != OURS]
    parser.add_argument("--peers", type=words, default=peers, help=f"of {', '.join(peers)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round, and at least three steps")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds to get ready in, compiling included")
    parser.add_argument("--memory-limit", type=float, help="GB that a step may take (default: what the machine has)")
    parser.add_argument("--out", type=Path, help="folder that train.json, .md and .png are made or merged in")
    options = parser.parse_args()
    options.models = [_whole_name(model) for model in options.models]
    require_known(
        parser,
        ("--models", options.models, training.MODELS),
        ("--precision", options.precision, training.PRECISIONS),
        ("--peers", options.peers, peers),
    )
    if options.memory_cases is None:
        options.memory_cases = [*CASES, *MEMORY_CASES] if options.cases is None else options.cases
    if options.cases is None:
        options.cases = CASES
    for name in ("cases", "memory_cases"):
        chosen = dict.fromkeys(case for case in getattr(options, name) if _is_asked(case, options))  # each once
        setattr(options, name, list(chosen))
    if not options.cases and not options.memory_cases:
        parser.error("--models and --precision leave no case; --cases names others")
    return options


def _is_asked(case: TrainCase, options: argparse.Namespace) -> bool:
    of_model = not options.models or case.model in options.models
    return of_model and (not options.precision or case.precision in options.precision)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    measures_peaks = True
    try:
        peak.build()
    except peak.Unavailable as error:
        console.print(f"The machine's peaks are not measured: {escape(str(error))}")
        measures_peaks = False
    rows: list[Row] = []
    memory: list[Row] = []
    with Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(options.cases) + len(options.memory_cases))
        for case in [*options.cases, *options.memory_cases]:
            progress.update(task, description=str(case))
            if len(rows) < len(options.cases):
                meter = peak.Meter(cpp.isa(), options.threads)
                made = compare(case, options, meter.measure if measures_peaks else lambda: None)
                rows.append(made | {"peaks": meter.medians()})
            else:
                memory.append(weigh(case, options))
            progress.advance(task)
            if options.out:
                train_report.save(rows, memory, options.out)
    rows, memory = (report.merge([], new, train_report.key) for new in (rows, memory))
    print(train_report.markdown(rows, memory))
    lines = train_report.slower(rows)
    if lines:
        print("Slower than plain torch, or not right:", *lines, sep="\n", file=sys.stderr)
        raise SystemExit(1)
