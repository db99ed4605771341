"""The instruction set that the kernels run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ... import _C
from ...ops import BackendMisconfigured

# Every instruction set that is built in, best first; `isas` tells which of them this CPU runs.
ISAS: list[str] = _C.built_isas()


def isas() -> list[str]:
    """The instruction sets that this CPU runs, best first."""
    return _C.runnable_isas()


def isa() -> str:
    """The instruction set in use."""
    return _isa


def _check_isa(name: str, source: str) -> str:
    if name not in isas():
        raise BackendMisconfigured(f"{source} must be one that this CPU runs ({', '.join(isas())}), got {name!r}")
    return name


# The cap itself: a CPU runs every ISA below its best.
_isa = _check_isa(os.environ.get("PVT_FAST_ISA") or isas()[0], "PVT_FAST_ISA")


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, ops run on instruction set `name`; BackendMisconfigured if this CPU cannot run it.

    For tests and comparisons: it holds for the whole process, and weights are packed anew at each change.
    """
    global _isa
    before, _isa = _isa, _check_isa(name, "use_isa: name")
    try:
        yield
    finally:
        _isa = before
