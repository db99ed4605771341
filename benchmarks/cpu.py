"""Whole models on CPUs against what else runs them; single ops: `python benchmarks/cpu.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.cpu.models import main

if __name__ == "__main__":
    main()
