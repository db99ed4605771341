"""Whole models on a GPU: one case gives one row of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pvt_fast import testing
from pvt_fast.config import VARIANTS, PVTConfig

from ..case import Case
from ..comparison import Worker, cells
from ..models import truth
from ..report import Row
from .contenders import contend
from .plan import Place
from .report import OUT_OF_TIME

# Bursts of each contender, and about how many seconds each takes.
ROUNDS, BURST_S = 7, 0.2
# A burst that takes longer is a process that hangs.
BURST_LIMIT_S = 60


def checked_rows(case: Case) -> list[int]:
    """Places in the batch of the images held against float64: half from each end, of large images fewer."""
    count = min(case.batch, 4 if case.size < 512 else 2)
    return [*range((count + 1) // 2), *range(case.batch - count // 2, case.batch)]


def compare(
    case: Case, names: Sequence[str], left: Callable[[], float], place: Place, tell: Callable[[str], None]
) -> Row:
    """Check and time the contenders on one case.

    left: seconds that remain. Contenders that are not ready when only the rounds' time remains are left out, and the
    rounds end early rather than late.
    """
    rows = checked_rows(case)
    workers = [Worker(name, contend, name, case, place, rows) for name in names]
    try:
        exact = truth(case, rows)
        for worker in workers:
            seconds = left() - 2 * ROUNDS * BURST_S * len(names)
            if seconds > 0:
                tell(f"{case}: {worker.name} gets ready")
                worker.prepare(exact, seconds)
            else:
                worker.failure = OUT_OF_TIME
            if worker.failure:
                tell(f"{case}: {worker.name} did not run: {worker.failure}")
        timed = cells(workers, ROUNDS, BURST_S, left(), BURST_LIMIT_S)
    finally:
        for worker in workers:
            worker.server.kill()  # a GPU process takes seconds to end by itself
    flop = testing.model_flops(PVTConfig(**VARIANTS[case.model]), case.batch, (case.size, case.size))
    bound = testing.parity_bounds(*exact)["largest"]
    return {**case._asdict(), "gflop": flop / 1e9, "peaks": {}, "bound": bound, "contenders": timed}
