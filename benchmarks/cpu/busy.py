"""Whole models on a CPU that other processes use, too, or of which a container gives a part only.

    python benchmarks/busy.py --models b0,b2 --dtype fp32 --peers openvino --busy 0,1,2,4 --quota 1.5

Contenders as in `cpu.py`, each in a process of its own, in turns, its logits held against float64 first. `--busy`
counts processes beside them that do nothing but spin; `--quota` puts a contender's process into a control group that
may use so many cores (wants the right to make one). Medians and 95 % quantiles of single calls, and those of others
over ours.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing as mp
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch

from pvt_fast.cli.timing import in_turns

from ..case import Case
from ..comparison import Worker
from ..models import truth
from .contenders import CONTENDERS
from .models import contenders_of, cpu_name, numbers, ready, require_cases, words

PERIOD = 100_000  # microseconds, the kernel's default


def spin() -> None:
    while True:
        pass


@contextmanager
def beside(count: int) -> Iterator[None]:
    """`count` busy processes beside this one."""
    processes = [mp.get_context("fork").Process(target=spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def limited(pids: list[int], cores: float | None) -> Iterator[None]:
    """Each process in a control group of its own that may use `cores` cores; None: no limit."""
    groups = [] if cores is None else [_make_group(pid, cores) for pid in pids]
    for group, pid in zip(groups, pids, strict=False):
        (group / "cgroup.procs").write_text(str(pid))
    try:
        yield
    finally:
        for group, pid in zip(groups, pids, strict=False):
            (group.parent / "cgroup.procs").write_text(str(pid))
            group.rmdir()


def _make_group(pid: int, cores: float) -> Path:
    root = Path("/sys/fs/cgroup")
    first_version = (root / "cpu" / "cgroup.procs").exists()
    group = (root / "cpu" if first_version else root) / f"pvt_fast_{os.getpid()}_{pid}"
    group.mkdir()
    quota = int(cores * PERIOD)
    if first_version:
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (group / "cpu.max").write_text(f"{quota} {PERIOD}")
    return group


def compare(case: Case, options: argparse.Namespace) -> None:
    conditions = [(f"{busy} busy", busy, None) for busy in options.busy]
    conditions += [(f"{cores:g} cores", 0, cores) for cores in options.quota]
    builds = {name: CONTENDERS[name] for name in contenders_of(options)}
    with ready(builds, case, truth(case), options.threads) as workers:
        for label, busy, cores in conditions:
            with limited([worker.server.pid for worker in workers], cores), beside(busy):
                times = in_turns([partial(worker.burst, options.seconds) for worker in workers], options.rounds)
            print(f"| {case.model} {case.dtype} | {label} | " + " | ".join(_cells(workers, times)) + " |", flush=True)


def _cells(workers: list[Worker], times: list[list[float]]) -> Iterator[str]:
    ours = None
    for worker, seconds in zip(workers, times, strict=True):
        if worker.failure:
            yield worker.failure
            continue
        cuts = quantiles(seconds, n=20, method="inclusive")
        middle, late = 1e3 * cuts[9], 1e3 * cuts[18]
        ours = ours or (middle, late)
        ratios = "" if worker is workers[0] else f" ({middle / ours[0]:.2f}, {late / ours[1]:.2f})"
        yield f"{middle:.1f}, {late:.1f}{ratios}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=words, default=["b0", "b2"])
    parser.add_argument("--dtype", type=words, default=["fp32"])
    parser.add_argument("--peers", type=words, default=["openvino"], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--busy", type=numbers, default=[0, 1, 2, 4], help="processes beside")
    parser.add_argument("--quota", type=lambda text: [float(word) for word in words(text)], default=[], help="cores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5, help="per contender and round")
    options = parser.parse_args()
    require_cases(parser, options)
    return options


def main() -> None:
    options = parse()
    print(f"{cpu_name()}, {options.threads} threads, 224 px, batch 1; ms: median, 95 % (over ours)\n")
    names = contenders_of(options)
    print(f"| model | beside | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for model, dtype in itertools.product(options.models, options.dtype):
        compare(Case(model, 1, 224, dtype), options)
