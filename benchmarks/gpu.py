"""Everything that wants a CUDA GPU: `python benchmarks/gpu.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.gpu.command import main

if __name__ == "__main__":
    main()
