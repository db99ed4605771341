"""Measurements of pvt_fast, by room; `results` has what was measured.

`cpu` and `gpu` time models and ops against what else runs them, `gates` compiles the GPU kernels without a GPU,
`counts` counts instructions. cpu.py, gpu.py and others beside them only start a command of a room; the rest is shared.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
