"""A model's least time on a GPU, predicted without one: `python benchmarks/roofline.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this tree, from any working directory

from benchmarks.gpu.roofline import main

if __name__ == "__main__":
    main()
