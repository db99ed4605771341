"""Whole models on CPUs: pvt_fast against what else runs them, each contender in a process of its own, in turns.

    python benchmarks/cpu.py --models b0,b2,b2_li --batch 1,8 --size 224 --dtype fp32,bf16 --peers timm,compile

Every contender's logits are held against float64 before it is timed, and the error stands beside the time. Rounds go
through the contenders one after the other, so that a change of clock or load meets all alike; medians of all rounds
count, and only ratios within one run compare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import platform
import re
import time
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from contenders import CONTENDERS, Case, truth
from rich.console import Console
from rich.progress import Progress

import pvt_fast
from pvt_fast import cpp


def serve(connection: Connection, name: str, case: Case, threads: int) -> None:
    """A contender's process: build, answer with the logits, then time bursts of calls on demand."""
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            call = CONTENDERS[name](case)
            for _ in range(3):
                logits = call()
            connection.send(("ready", logits.double()))
            while (seconds := connection.recv()) is not None:
                connection.send(("times", burst(call, seconds)))
    except Exception as error:  # the comparison goes on without this contender and says why
        connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0][:200]))


def burst(call: Any, seconds: float) -> list[float]:
    """Seconds of each call for about that long, at least three; one call before them wakes the threads."""
    call()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, case: Case, threads: int) -> None:
        self.name = name
        context = mp.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, name, case, threads), daemon=True)
        self.process.start()
        child.close()
        self.times: list[float] = []
        kind, value = self._receive()
        self.failure = value if kind == "failed" else None
        self.logits = value if kind == "ready" else None

    def _receive(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except EOFError:
            return "failed", f"its process ended with status {self.process.exitcode}"

    def burst(self, seconds: float) -> None:
        self.connection.send(seconds)
        kind, value = self._receive()
        if kind == "failed":
            self.failure = value
        else:
            self.times += value

    def close(self) -> None:
        if self.process.is_alive() and self.failure is None:
            self.connection.send(None)
        self.process.join(timeout=10)
        self.process.kill()


def compare(case: Case, names: list[str], options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Time one case; its row of the report."""
    task = progress.add_task(str(case), total=len(names) + options.rounds)
    exact, plain = truth(case)
    bound = 2 * float((plain - exact).abs().max()) + torch.finfo(case.torch_dtype).eps * float(exact.abs().max())
    contenders = []
    for name in names:
        contenders.append(Contender(name, case, options.threads))
        progress.advance(task)
    running = [c for c in contenders if c.failure is None]
    ours = next(c for c in contenders if c.name == "pvt_fast")
    if ours.failure:
        raise SystemExit(f"cpu.py: pvt_fast failed on {case}: {ours.failure}")
    error = {c.name: float((c.logits - exact).abs().max()) for c in running}
    if error["pvt_fast"] > bound:
        raise SystemExit(
            f"cpu.py: pvt_fast errs by {error['pvt_fast']:.2e} on {case}, the parity rule allows {bound:.2e}"
        )
    for _ in range(options.rounds):
        for contender in running:
            contender.burst(options.seconds)
        progress.advance(task)
    for contender in contenders:
        contender.close()
    progress.remove_task(task)
    row: dict[str, Any] = {"case": str(case), **case._asdict(), "contenders": {}}
    for contender in contenders:
        if contender.failure:
            row["contenders"][contender.name] = {"failure": contender.failure}
            continue
        ms = [1e3 * t for t in contender.times]
        deciles = quantiles(ms, n=10)
        row["contenders"][contender.name] = {
            "ms": median(ms),
            "ms_10": deciles[0],
            "ms_90": deciles[-1],
            "calls": len(ms),
            "error": error[contender.name],
            "ratio": median(ms) / (1e3 * median(ours.times)),
        }
    return row


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown table: median ms, and in brackets the ratio of its time to ours."""
    names = report["contenders"]
    lines = [
        f"{report['cpu']}, {report['threads']} threads, {report['date']}; "
        + ", ".join(f"{package} {number}" for package, number in report["versions"].items()),
        "",
        "| case | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in report["rows"]:
        cells = []
        for name in names:
            cell = row["contenders"][name]
            if "failure" in cell:
                cells.append("-")
            else:
                ratio = "" if name == "pvt_fast" else f" ({cell['ratio']:.2f})"
                cells.append(f"{cell['ms']:.1f}{ratio}")
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()} ({cpp.isa()})"


def parse() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=words, default=["b0", "b2", "b2_li"], help="comma-separated, e.g. b0,b2_li")
    parser.add_argument("--batch", type=words, default=["1"])
    parser.add_argument("--size", type=words, default=["224"], help="image side in pixels")
    parser.add_argument("--dtype", type=words, default=["fp32", "bf16"])
    parser.add_argument("--peers", type=words, default=["timm", "compile"], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="per contender and round")
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md")
    options = parser.parse_args()
    for option, given, known in (
        ("--models", [f"pvt_v2_{m}" for m in options.models], pvt_fast.list_models()),
        ("--dtype", options.dtype, ["fp32", "bf16"]),
        ("--peers", options.peers, list(CONTENDERS)),
    ):
        for word in given:
            if word not in known:
                parser.error(f"{option} must be among {', '.join(known)}; got {word}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    names = ["pvt_fast", *(peer for peer in options.peers if peer != "pvt_fast")]
    cases = [
        Case(f"pvt_v2_{model}", int(batch), int(size), dtype)
        for model, batch, size, dtype in itertools.product(options.models, options.batch, options.size, options.dtype)
    ]
    packages = {"timm": "timm", "compile": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": options.threads,
        "date": date.today().isoformat(),
        "versions": {"torch": version("torch")} | {packages[n]: version(packages[n]) for n in names if n in packages},
        "contenders": names,
        "rows": [],
    }
    with Progress(console=Console(stderr=True)) as progress:
        for case in progress.track(cases, description="cases"):
            report["rows"].append(compare(case, names, options, progress))
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
                (options.out / "cpu.md").write_text(markdown(report))
    print(markdown(report))
    for row in report["rows"]:
        for name, cell in row["contenders"].items():
            print(
                f"{row['case']:28} {name:12}",
                cell.get("failure")
                or f"{cell['ms']:8.2f} ms [{cell['ms_10']:.2f}, {cell['ms_90']:.2f}]  error {cell['error']:.1e}",
            )


if __name__ == "__main__":
    main()
