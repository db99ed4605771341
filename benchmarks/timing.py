"""Bursts of timed calls, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import torch


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


class Stopwatch:
    """Times stretches of a device's work: on a GPU by events, which do not stop its queue, on a CPU by the clock."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._starts: list[Any] = []
        self._ends: list[Any] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._starts.append(self._now())

    def stop(self) -> None:
        self._ends.append(self._now())

    def seconds(self) -> list[float]:
        """Of each stretch so far; waits for the device."""
        pairs = list(zip(self._starts, self._ends, strict=True))
        if not self._on_gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
