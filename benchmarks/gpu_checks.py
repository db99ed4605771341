"""What `gpu.py` runs as programs: the build, the tests, compute-sanitizer; and what is told of their output."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from source_tree import ROOT

# In the order of what would be missed most if the time is over.
TESTS = ("test_gpu.py", "test_triton_backend.py", "test_ops.py", "test_triton_parity.py")
# compute-sanitizer's exit status for findings; any other than 0 is the program's own
FINDINGS = 86
SUMMARY = re.compile(
    r"=+ (?:RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed \((?P<race_errors>\d+) errors?, (?P<warnings>\d+) "
    r"warnings?\)|ERROR SUMMARY: (?P<errors>\d+) errors?)"
)


class Check(NamedTuple):
    """One program's outcome: "passed", "failed" or "did not run", in a sentence, with the last lines it printed."""

    outcome: str
    told: str
    lines: tuple[str, ...] = ()


class Finished(NamedTuple):
    """`status` is None where the time was over."""

    status: int | None
    output: str


def run(command: list[str], limit_s: float, **environment: str) -> Finished:
    """A command in the root of the tree, for that long at most; standard output and error together.

    It has a process group of its own, which ends with it: pytest and compilers start others.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return Finished(None, output)
    return Finished(process.returncode, output)


def last_lines(output: str, count: int = 12) -> tuple[str, ...]:
    return tuple(line.rstrip()[:300] for line in output.splitlines() if line.strip())[-count:]


def missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def build(limit_s: float) -> Check:
    """The C++ extension in place, without which the package does not import."""
    absent = missing(("pybind11", "setuptools"))
    if absent:
        return Check("did not run", f"not installed: {', '.join(absent)}")
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], limit_s)
    return judge(done, limit_s)


def judge(done: Finished, limit_s: float) -> Check:
    """Of a program that tells by its exit status."""
    lines = last_lines(done.output)
    if done.status is None:
        return Check("failed", f"ended after {limit_s:.0f} s, its limit", lines)
    return Check("failed" if done.status else "passed", lines[-1] if lines else f"status {done.status}", lines)


def imported_packages(path: Path) -> list[str]:
    """Top-level packages that a file imports at its top."""
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def runnable_tests(folder: Path, names: tuple[str, ...] = TESTS) -> tuple[list[Path], list[str]]:
    """(files that can be collected here, a sentence for each that cannot)."""
    found, told = [], []
    for path in (folder / name for name in names):
        if not path.exists():
            told.append(f"{path.name} is not there")
        elif absent := missing(tuple(imported_packages(path))):
            told.append(f"{path.name} was left out: it imports {', '.join(absent)}, not installed")
        else:
            found.append(path)
    return found, told


def tests(limit_s: float) -> Check:
    """The GPU tests, in several processes where pytest-xdist is there: most of their time is compilation."""
    if missing(("pytest",)):
        return Check("did not run", "not installed: pytest")
    files, left_out = runnable_tests(ROOT / "tests")
    if not files:
        return Check("did not run", "; ".join(left_out))
    parallel = [] if missing(("xdist",)) else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend", "triton", *parallel]
    check = judge(run([*command, *map(str, files)], limit_s), limit_s)
    return check._replace(told="; ".join((check.told, *left_out)))


def sanitizer_program() -> str | None:
    """compute-sanitizer from PATH or a CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitize(tool: str, script: Path, limit_s: float) -> Check:
    """Every op once under "memcheck" or "racecheck": out-of-bounds accesses, races in shared memory.

    A run without the tool first leaves the compiled kernels in Triton's cache. Then torch allocates nothing from a
    pool, in which an access past a tensor's end would hit another one's memory.
    """
    program = sanitizer_program()
    if program is None:
        return Check("did not run", "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    target = [sys.executable, str(script), "--sanitize-target"]
    plain = run(target, limit_s / 2)
    if plain.status != 0:
        return judge(plain, limit_s / 2)._replace(outcome="failed")
    command = [program, "--tool", tool, "--error-exitcode", str(FINDINGS), *target]
    return parse_sanitizer(tool, run(command, limit_s / 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1"), limit_s / 2)


def parse_sanitizer(tool: str, done: Finished, limit_s: float) -> Check:
    """Passed only with a summary of no findings and a program that ended well: each was seen without the other."""
    lines = last_lines("\n".join(line for line in done.output.splitlines() if line.startswith("===")))
    if done.status is None:
        return Check("failed", f"ended after {limit_s:.0f} s, its limit", lines)
    summary = next(reversed(list(SUMMARY.finditer(done.output))), None)
    if summary is None:
        told = (last_lines(done.output, 1) or ("no output",))[0]
        return Check("did not run", f"{tool} gave no summary, status {done.status}: {told}", lines)
    counts = {name: int(value) for name, value in summary.groupdict().items() if value is not None}
    told = summary[0].lstrip("= ").lower()
    if any(counts.values()):
        return Check("failed", told, lines)
    if done.status != 0:
        return Check("failed", f"{told}, but the program ended with status {done.status}", last_lines(done.output))
    return Check("passed", told)


def nvidia_smi(field: str) -> str | None:
    """One field of the first GPU, or None where the tool is not there or does not know it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
