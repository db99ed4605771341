"""Training steps on CPUs, and the memory that they take: `python benchmarks/train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.cpu.train import main

if __name__ == "__main__":
    main()
