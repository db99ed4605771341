"""The machine's peaks, measured by `peak.cpp`, which is compiled at first use."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import median

from .. import ROOT

SOURCE = Path(__file__).with_name("peak.cpp")
PROGRAM = ROOT / "build" / "peak"


class Unavailable(RuntimeError):
    """Peaks cannot be measured here; says why."""


def build() -> None:
    """Compile `peak.cpp` where that was not done yet; raises Unavailable."""
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < SOURCE.stat().st_mtime:
        PROGRAM.parent.mkdir(exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        _run([*compiler, "-O3", "-fopenmp", str(SOURCE), "-o", str(PROGRAM)])


class Meter:
    """The peaks of `threads` threads on an instruction set: medians of what every `measure()` found.

    It is called between the rounds of what is set against the peaks: a machine that others use too has the peaks of
    the moment.
    """

    def __init__(self, isa: str, threads: int) -> None:
        self._command = [str(PROGRAM), isa, str(threads)]
        self._measured: dict[str, list[float]] = defaultdict(list)

    def measure(self) -> None:
        for name, value in json.loads(_run(self._command)).items():
            self._measured[name].append(value)

    def medians(self) -> dict[str, float]:
        """ "fp32" and "bf16" in GFLOP/s, "read" in GB/s; empty before the first measurement."""
        return {name: median(values) for name, values in self._measured.items()}


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} was not found; CXX names the C++ compiler") from error
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{shlex.join(command)} failed: {error.stderr.strip()}") from error
