"""How everything here is timed, `pvt-fast bench` and benchmarks/ alike: in turns, told as median and deciles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch

# Calls of a burst and rounds of a comparison that are made even when the time for them is over.
FEWEST = 3


class Spread(NamedTuple):
    """Milliseconds of a call, median and first and last decile, over so many `calls`."""

    ms: float
    ms_10: float
    ms_90: float
    calls: int


def spread(seconds: Sequence[float]) -> Spread:
    """The spread of calls that took these seconds, of which there must be at least one."""
    ms = [1e3 * each for each in seconds]
    deciles = quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms
    return Spread(median(ms), deciles[0], deciles[-1], len(ms))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's queue empty before and after it where a GPU is in use."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def burst(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for about `seconds` in all; one call before them wakes the threads."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or time.perf_counter() < end:
        times.append(timed(call))
    return times


def in_turns(
    bursts: Sequence[Callable[[], Iterable[float]]],
    rounds: int,
    budget_s: float = float("inf"),
    after_round: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """The seconds that each burst gave over all rounds: A, B, C, A, B, C, ...

    A change of clock speed or of the machine's load meets all of them alike. No round begins once `budget_s` seconds
    have passed, but for the first `FEWEST`.
    """
    seconds: list[list[float]] = [[] for _ in bursts]
    end = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= FEWEST and time.perf_counter() > end:
            break
        for measure, times in zip(bursts, seconds, strict=True):
            times += measure()
        after_round()
    return seconds


def _nothing() -> None:
    pass
