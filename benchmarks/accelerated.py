"""Models of others on CPUs, before and after `accelerate_`: `python benchmarks/accelerated.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.cpu.accelerated import main

if __name__ == "__main__":
    main()
