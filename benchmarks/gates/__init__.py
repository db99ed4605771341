"""The gates before any GPU: kernels compiled ahead of time fit their chip, do not spill, use its matrix units and wide
loads, and stay within the committed number of instructions per hidden element.

compilations.py lists what the backend compiles for the published networks, resources.py compiles one and reads its
machine code, limits.py holds the gates, and table.py the committed results: table.json has one row per compilation, so
that only what changed has to be compiled again. `python -m benchmarks.gates --help` tells how to run them.
"""
