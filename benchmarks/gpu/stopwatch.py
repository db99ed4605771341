"""A clock for work on a device, which may be queued; calls are timed by `pvt_fast.cli.timing`."""

from __future__ import annotations

import time
from typing import Any

import torch


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
