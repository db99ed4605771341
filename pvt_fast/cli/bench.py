"""Compare backends on one model and one input: the answers first, then the time, in turns.

Every contender's answer is checked against float64 before a clock starts. Then the contenders run in rounds, one call
each in every round, so that a change of clock speed or of the load of the machine meets all of them alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..backend.dispatch import BackendUnavailable, backends, cannot_run
from ..model import PVT_V2
from ..testing import assert_parity, model_truth
from .timing import Spread, in_turns, spread, timed

# Columns of the tables where the output is no terminal and so has no width of its own.
_WIDTH = 120


class ParityError(RuntimeError):
    """A backend's answer is further from float64 than the parity rule of `testing.assert_parity` allows."""


class Contender(NamedTuple):
    """A `backend` by name, run in `dtype` on `device` ("cpu", "cuda")."""

    backend: str
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.backend} {dtype_name(self.dtype)} on {self.device}"


@dataclass(frozen=True)
class Result:
    """What a contender answered, `output (B, num_classes)` float64 on the CPU, and the `seconds` of its timed calls."""

    contender: Contender
    output: Tensor
    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Milliseconds a call."""
        return spread(self.seconds)

    @property
    def median(self) -> float:
        """Seconds a call."""
        return median(self.seconds)

    @property
    def images_per_s(self) -> float:
        return len(self.output) / self.median


class Comparison(NamedTuple):
    """`results` of the contenders that can run, and why each of the others cannot."""

    results: list[Result]
    refusals: dict[Contender, str]

    def speedup(self, result: Result) -> float | None:
        """Median of the reference of the same dtype and device over the result's; None without that reference."""
        reference = self.find("reference", result.contender.dtype, result.contender.device)
        return reference.median / result.median if reference else None

    def find(self, backend: str, dtype: torch.dtype, device: str) -> Result | None:
        return next((r for r in self.results if r.contender == (backend, dtype, device)), None)

    def refused(self) -> dict[str, str]:
        """Backends that ran nowhere, each with its reason."""
        ran = {result.contender.backend for result in self.results}
        return {c.backend: reason for c, reason in self.refusals.items() if c.backend not in ran}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def devices() -> list[str]:
    """Kinds of device on this machine that the backends are for."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@torch.inference_mode()
def compare(
    model: PVT_V2,
    images: Tensor,
    contenders: Sequence[Contender],
    rounds: int,
    budget_s: float = float("inf"),
    parity_images: int = 4,
) -> Comparison:
    """Check and time the contenders on images (B, Cin, H, W).

    `rounds` timed calls each, fewer (at least `timing.FEWEST`) once `budget_s` seconds have passed. Parity is checked
    on `parity_images` images from both ends of the batch. Raises ParityError; the model is left as it is.
    """
    calls: dict[Contender, Callable[[], Tensor]] = {}
    refusals: dict[Contender, str] = {}
    outputs: dict[Contender, Tensor] = {}
    absent = {status.name: status.reason for status in backends() if not status.available}
    for contender in contenders:
        if contender.backend in absent:
            refusals[contender] = str(cannot_run(contender.backend, absent[contender.backend]))
            continue
        call = _call(model, images, contender)
        try:
            outputs[contender] = call()
        except BackendUnavailable as error:
            refusals[contender] = str(error)
        else:
            calls[contender] = call
    check(model, images, outputs, parity_images)
    seconds = interleave(list(calls.values()), rounds, budget_s)
    results = [
        Result(contender, outputs[contender].cpu().double(), tuple(times))
        for contender, times in zip(calls, seconds, strict=True)
    ]
    return Comparison(results, refusals)


@torch.inference_mode()
def check(model: PVT_V2, images: Tensor, outputs: Mapping[Contender, Tensor], parity_images: int = 4) -> None:
    """Hold each contender's output (B, num_classes) against float64 and plain torch in its dtype, both of `reference`.

    Raises ParityError with the contender, the error and the bound.
    """
    count = min(parity_images, len(images))
    rows = torch.cat([torch.arange((count + 1) // 2), torch.arange(len(images) - count // 2, len(images))])
    truths: dict[tuple[torch.dtype, str], tuple[Tensor, Tensor]] = {}
    for contender, output in outputs.items():
        _, dtype, device = contender
        if (dtype, device) not in truths:
            truths[dtype, device] = model_truth(model, images[rows].to(device, dtype))
        try:
            assert_parity(output.cpu()[rows], *truths[dtype, device], str(contender))
        except AssertionError as error:
            raise ParityError(str(error)) from error


def interleave(calls: Sequence[Callable[[], object]], rounds: int, budget_s: float = float("inf")) -> list[list[float]]:
    """Seconds of each call in each round, in turns, after one more call of each to warm up."""
    for call in calls:
        call()
    return in_turns([partial(_timed_once, call) for call in calls], rounds, budget_s)


def _timed_once(call: Callable[[], object]) -> list[float]:
    return [timed(call)]


def console(kind: type[Console] = Console) -> Console:
    """A console on stdout that is wide enough for the tables also in a file or a pipe."""
    stdout = kind()
    return stdout if stdout.is_terminal else kind(width=_WIDTH)


def timing_table(
    title: str, comparison: Comparison, columns: Mapping[str, Callable[[Result], str]] | None = None
) -> Table:
    """One row per result: who, the given columns, median and 10-90 % range, images/s, speed-up over the reference."""
    columns = columns or {}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("backend", "dtype", "device"):
        table.add_column(heading)
    for heading in (*columns, "ms, median", "ms, 10-90 %", "images/s", "speed-up"):
        table.add_column(heading, justify="right", overflow="fold")
    for result in comparison.results:
        speedup = comparison.speedup(result)
        table.add_row(
            result.contender.backend,
            dtype_name(result.contender.dtype),
            result.contender.device,
            *(show(result) for show in columns.values()),
            _milliseconds(result.spread.ms),
            f"{_milliseconds(result.spread.ms_10)}-{_milliseconds(result.spread.ms_90)}",
            f"{result.images_per_s:,.1f}",
            "-" if speedup is None else f"{speedup:.2f}x",
        )
    return table


def _call(model: PVT_V2, images: Tensor, contender: Contender) -> Callable[[], Tensor]:
    """A call of the contender on its own copy of model and images, so that no cache of packed weights is shared."""
    own = copy.deepcopy(model).eval().to(contender.device, contender.dtype)
    own.backend = contender.backend
    image = images.to(contender.device, contender.dtype)
    return lambda: own(image)


def _milliseconds(ms: float) -> str:
    return f"{ms:.{1 if ms >= 10 else 2}f}"
