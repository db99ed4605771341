"""What `gpu.py` runs as programs: the build, the tests, compute-sanitizer; and what is told of their output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

from .. import ROOT

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
        return Finished(None, process.communicate()[0])
    return Finished(process.returncode, output)


def last_lines(output: str) -> tuple[str, ...]:
    return tuple(line.rstrip()[:300] for line in output.splitlines() if line.strip())[-12:]


def judge(done: Finished) -> Check:
    """Of a program that tells by its exit status."""
    lines = last_lines(done.output)
    if done.status is None:
        return Check("failed", "ended at its limit of time", lines)
    return Check("failed" if done.status else "passed", lines[-1] if lines else f"status {done.status}", lines)


def build(limit_s: float) -> Check:
    """The C++ extension in place, without which the package does not import."""
    return judge(run([sys.executable, "setup.py", "build_ext", "--inplace"], limit_s))


def tests(limit_s: float) -> Check:
    """The GPU tests, in several processes where pytest-xdist is there: most of their time is compilation."""
    if find_spec("pytest") is None:
        return Check("did not run", "not installed: pytest")
    files = [str(path) for name in TESTS for path in (ROOT / "tests").rglob(name)]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    # a file that imports what is not installed fails alone
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--backend", "triton", *parallel]
    return judge(run([sys.executable, "-m", "pytest", *options, *files], limit_s))


def sanitizer_program() -> str | None:
    """compute-sanitizer from PATH or a CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def sanitize(tool: str, limit_s: float) -> Check:
    """Every op once under "memcheck" or "racecheck": out-of-bounds accesses, races in shared memory.

    A run without the tool first leaves the compiled kernels in Triton's cache. Then torch allocates nothing from a
    pool, in which an access past a tensor's end would hit another one's memory.
    """
    program = sanitizer_program()
    if program is None:
        return Check("did not run", "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    target = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
    plain = run(target, limit_s / 2)
    if plain.status != 0:
        return judge(plain)
    command = [program, "--tool", tool, "--error-exitcode", str(FINDINGS), *target]
    return parse_sanitizer(run(command, limit_s / 2, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def parse_sanitizer(done: Finished) -> Check:
    """Passed only with a summary of no findings and a program that ended well: each was seen without the other."""
    lines = last_lines("\n".join(line for line in done.output.splitlines() if line.startswith("===")))
    summary = next(reversed(list(SUMMARY.finditer(done.output))), None)
    if done.status is None:
        return judge(done)
    if summary is None:
        return Check("did not run", f"no summary, status {done.status}: {''.join(last_lines(done.output)[-1:])}", lines)
    told = summary[0].lstrip("= ").lower()
    if any(int(count) for count in summary.groups() if count is not None):
        return Check("failed", told, lines)
    if done.status != 0:
        return Check("failed", f"{told}, but the program ended with status {done.status}", last_lines(done.output))
    return Check("passed", told)


def nvidia_smi(field: str) -> str | None:
    """One field of the first GPU, or None where the tool is not there or does not know it."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
