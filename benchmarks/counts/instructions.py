"""Instruction counts of fixed op calls against the committed ones: a check of speed that needs no quiet machine.

    python benchmarks/counts/instructions.py build/instructions             # compare; fails outside the band
    python benchmarks/counts/instructions.py build/instructions --update    # write the counts of now

valgrind's callgrind counts what `instructions.cpp` executes inside its call, packing excluded. It emulates a CPU with
AVX2 and 256 KiB of second-level cache, whichever machine it runs on, so that counts differ only by source and compiler.
They do not see cache misses: a change that wins by fewer of them may well execute more instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMITTED = Path(__file__).with_name("instructions.json")
BAND = 0.03


def compare(counted: dict[str, int], committed: dict[str, int]) -> list[str]:
    """A complaint for each call whose count left the band around the committed one, either way."""
    complaints = [f"{name}: no longer counted" for name in committed if name not in counted]
    for name, count in counted.items():
        if name not in committed:
            complaints.append(f"{name}: {count:,} instructions, none committed")
        elif abs(change := count / committed[name] - 1) > BAND:
            complaints.append(
                f"{name}: {count:,} instructions, {committed[name]:,} committed: {change:+.1%}, "
                f"{'more' if change > 0 else 'fewer'} than the band of {BAND:.0%} allows"
            )
    return complaints


def instructions(callgrind_out: str) -> int:
    """The number of instructions that a callgrind output file sums up."""
    summary = re.search(r"^summary: (\d+)$", callgrind_out, re.MULTILINE)
    if summary is None:
        raise ValueError(f"a callgrind output file must have a line 'summary: N', got {callgrind_out[:200]!r}")
    return int(summary[1])


def count(driver: Path, name: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=counted", f"--callgrind-out-file={out}"]
        finished = subprocess.run([*command, str(driver), name], capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"instructions.py: {name} failed under valgrind:\n{finished.stderr}")
        return instructions(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("driver", type=Path, help="the program built from instructions.cpp")
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name} instead of comparing with it")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        raise SystemExit("instructions.py: valgrind must be installed (apt-get install valgrind)")
    listed = subprocess.run([options.driver], check=True, capture_output=True, text=True)
    compiler, *names = listed.stdout.splitlines()
    counted = {}
    for name in names:
        counted[name] = count(options.driver, name)
        print(f"{counted[name]:>14,}  {name}", flush=True)
    if options.update:
        COMMITTED.write_text(json.dumps({"compiler": compiler, "instructions": counted}, indent=1) + "\n")
        return
    committed = json.loads(COMMITTED.read_text())
    if complaints := compare(counted, committed["instructions"]):
        print(*complaints, sep="\n", file=sys.stderr)
        if compiler != committed["compiler"]:
            print(f"counted with {compiler}, committed with {committed['compiler']}", file=sys.stderr)
        raise SystemExit("If that is meant, or a gain: make instructions-update, and commit instructions.json with it.")


if __name__ == "__main__":
    main()
