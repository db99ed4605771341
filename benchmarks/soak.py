"""Mixed work for a given time, every answer checked, memory held to staying: `python benchmarks/soak.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.cpu.soak import main

if __name__ == "__main__":
    sys.exit(main())
