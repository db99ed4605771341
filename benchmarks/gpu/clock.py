"""Seconds of work on a device, which may be queued; other calls are timed by `pvt_fast.cli.timing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


def seconds(calls: Iterable[Callable[[], object]], device: str) -> list[float]:
    """Seconds of each call: on a GPU by events, which do not stop its queue, on a CPU by the clock.

    What the iterable does before it gives a call is not timed.
    """
    times = []
    for call in calls:
        start = _now(device)
        call()
        times.append((start, _now(device)))
    if device != "cuda":
        return [end - start for start, end in times]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in times]


def _now(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
