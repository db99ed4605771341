"""Whole models on a CPU that other processes use, too: `python benchmarks/busy.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.cpu.busy import main

if __name__ == "__main__":
    main()
