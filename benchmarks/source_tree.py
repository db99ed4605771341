"""Imported for its effect: a script of benchmarks/ finds this tree's pvt_fast where none is installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # after the script's own folder, before what is installed
