"""Bursts of timed calls, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any


def burst(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call for about that long, at least three; one call before them wakes the threads."""
    call()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile in milliseconds, and the number of calls."""
    ms = [1e3 * s for s in seconds]
    deciles = quantiles(ms, n=10, method="inclusive")
    return {"ms": median(ms), "ms_10": deciles[0], "ms_90": deciles[-1], "calls": len(ms)}
