"""The gates before any GPU: kernels compiled ahead of time fit their chip, do not spill, use its matrix units and wide
loads, and stay within the committed number of instructions per hidden element.

    python tests/gpu_gates.py [--targets sm_90,gfx942] [--dtypes bf16] [--candidates]

compiles every kernel of every published variant for every target and dtype, prints what they take and fails where one
is beyond a gate. With --candidates, what the autotuner would try instead (on sm_90, in 16 bits). The test suite runs a
part of it (test_triton_compile.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).with_name("triton_compile.py")
ROOT = SCRIPT.parent.parent
PARALLEL = os.cpu_count() or 1

TARGETS = ("sm_90", "sm_80", "sm_89", "sm_100", "gfx942")
DTYPES = ("bf16", "fp16", "fp32")
# b1, b3 and b4 have b2's widths (test_triton_compile.py checks that they compile nothing else), b5 differs in the MLP.
VARIANTS = ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5")

NO_MATRIX_PRODUCT = {"dwconv_gelu_kernel", "layer_norm_kernel", "pool_kernel", "token_mean_kernel"}
# Loops whose length is known when compiled may be unrolled; these have another.
LOOPING = {"dwconv_fc2_kernel", "head_attention_kernel", "norm_fc1_kernel", "norm_linear_kernel"}

# Instructions per hidden element in the main loop of dwconv_fc2_kernel on sm_90, by type of the hidden map and width of
# the tile of channels; what was measured, and half an instruction. GELU and taps alone are 10 in packed fp16, 22 in
# fp32 with the conversions. Below 25 the kernel is bound by memory as much as by arithmetic (benchmarks/GPU_NOTES.md).
INSTRUCTIONS = {("half", 64): 19.3, ("half", 128): 21.3, ("full", 64): 35.3, ("full", 128): 37.8}

Row = dict[str, Any]


class Job(NamedTuple):
    """A process's part of the compilations for one target and dtype."""

    target: str
    dtype: str
    variants: str
    share: str = "0/1"
    of: str = "defaults"


def run_python(*arguments: str) -> str:
    """Run Python without the interpreter of Triton, which this process itself may be using."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(ROOT), str(SCRIPT.parent), os.environ.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-4000:]}")
    return done.stdout


def compile_rows(jobs: Sequence[Job], told: Callable[[Job], None] = lambda job: None) -> list[Row]:
    """One row per distinct kernel of each job, a process per processor at a time."""

    def run(job: Job) -> list[Row]:
        output = run_python(str(SCRIPT), job.target, job.dtype, job.variants, "", job.share, job.of)
        told(job)
        return [json.loads(line) for line in output.splitlines()]

    with ThreadPoolExecutor(PARALLEL) as pool:
        return [row for rows in pool.map(run, jobs) for row in rows]


def over_shared_memory(row: Row) -> bool:
    return row["shared"] > row["limit"]


def spills(row: Row) -> bool:
    return row["spills"] > 0


def has_wrong_matrix_instructions(row: Row) -> bool:
    """NVIDIA's units do not multiply true fp32: there a matrix instruction would be TF32."""
    if row["kernel"] in NO_MATRIX_PRODUCT or (row["dtype"] == "fp32" and row["target"].startswith("sm_")):
        return row["matrix"]
    in_loop = row.get("matrix_in_loop", row["matrix"])  # AMD's loops are not looked at
    return not (in_loop if row["kernel"] in LOOPING else row["matrix"])


def has_narrow_loads(row: Row) -> bool:
    """No 16-byte load. The first patch embed gathers single pixels, in rows of the user's image."""
    return row["load"] < 16 and row["constants"].get("PER_TAP") is not False


def has_many_instructions(row: Row) -> bool:
    limit = instruction_limit(row)
    return limit is not None and row["per_element"] > limit


def instruction_limit(row: Row) -> float | None:
    if row["target"] != "sm_90" or row["dtype"] == "fp32" or "per_element" not in row:
        return None
    half = row["constants"]["BLOCK_H"] == 32
    return INSTRUCTIONS["half" if half else "full", row["constants"]["BLOCK_C"]]


GATES = (over_shared_memory, spills, has_wrong_matrix_instructions, has_narrow_loads, has_many_instructions)


def table(rows: Sequence[Row]) -> list[str]:
    """Per target, dtype and kernel: how many were compiled, and the worst of their resources."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["dtype"], row["kernel"]), []).append(row)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--candidates", action="store_true", help="those of the autotuner, instead of the defaults")
    options = parser.parse_args()
    jobs = [
        Job(target, dtype, ",".join(VARIANTS), f"{share}/4", "candidates" if options.candidates else "defaults")
        for target in options.targets.split(",")
        for dtype in options.dtypes.split(",")
        for share in range(4)
    ]
    rows = compile_rows(jobs, lambda job: print(f"compiled {' '.join(job)}", file=sys.stderr, flush=True))
    print("\n".join(table(rows)))
    # of a candidate the tuner takes the time, which tells more than its instructions
    gates = [gate for gate in GATES if not (options.candidates and gate is has_many_instructions)]
    failures = [(gate.__name__, row) for gate in gates for row in rows if gate(row)]
    for gate, row in failures:
        print(f"{gate}: {json.dumps(row)}")
    print(f"{len(rows)} kernels compiled, {len(failures)} beyond a gate")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
