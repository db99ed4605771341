"""Every launch of a forward alone: how long it takes, against what it has to do and what the GPU does at most."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvt_fast.cli.timing import spread
from pvt_fast.kernels.launch import Launch, recorded

from ..case import Case
from ..models import make_images, make_model
from .checks import nvidia_smi
from .clock import seconds
from .plan import Place
from .roofline import Ceilings, lane_rate, work_of


class Effort(NamedTuple):
    """How much is done for a figure."""

    repeats: int = 30  # of each launch
    # larger than any L2 cache; writing it also takes longer than Python takes to launch a kernel
    flush_bytes: int = 512 * 2**20
    copy_bytes: int = 2**30
    product_side: int = 8192


FULL = Effort()
# Where nvidia-smi does not tell: an H200's under load.
ASSUMED_CLOCK_GHZ = 1.755


def profile(case: Case, place: Place, effort: Effort = FULL) -> Generator[dict[str, Any], None, None]:
    """A process's work: one answer, `ceilings` and `launches` of a row of the report."""
    with torch.inference_mode():
        ceilings, limits = measure_ceilings(place.device, effort)
        model = make_model(case).to(place.device, case.torch_dtype)
        model.backend = place.backend
        images = make_images(case).to(place.device, case.torch_dtype)
        model(images)  # compiles, and packs weights
        with recorded() as launches:
            model(images)
        flush = make_flush(place.device, effort.flush_bytes)
        rows = []
        for group in distinct(launches):
            times = time_launches(group, place.device, flush, effort.repeats)
            rows.append(describe(group, limits, times))
    yield {"ceilings": ceilings, "launches": rows}


def distinct(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Launches grouped by kernel, constants, grid, and the shapes and types of their arguments."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        arguments = [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in launch.args]
        groups.setdefault(repr((launch.name, launch.constants, launch.grid, arguments)), []).append(launch)
    return list(groups.values())


def shape_of(launch: Launch) -> str:
    """What tells a launch from others of its kernel: the constants that are no block size, and the grid."""
    tuning = ("BLOCK_", "num_", "PRECISION", "EXACT")
    constants = [f"{name}={value}" for name, value in launch.constants.items() if not name.startswith(tuning)]
    return f"{' '.join(constants)} grid={'x'.join(map(str, launch.grid))}"


def describe(group: Sequence[Launch], limits: Ceilings, times: Sequence[float]) -> dict[str, Any]:
    """A row of the table of kernels, of launches that differ in the values of their arguments only."""
    work = work_of(group[0])
    shares = limits.shares(work)
    timed = spread(times)
    return {
        "kernel": group[0].name,
        "shape": shape_of(group[0]),
        "constants": dict(group[0].constants),
        "count": len(group),
        **{name.replace("ms", "us"): 1e3 * getattr(timed, name) for name in ("ms", "ms_10", "ms_90")},
        **work._asdict(),
        "roofline_us": 1e6 * limits.seconds(work),
        "bound_by": max(shares, key=shares.__getitem__),
    }


def time_launches(launches: Sequence[Launch], device: str, flush: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of so many starts, going through the launches in turn, each after a flush of the cache."""

    def starts() -> Iterator[Callable[[], Any]]:
        for index in range(repeats):
            launch = launches[index % len(launches)]
            clear_counters(launch)
            flush()
            yield partial(start, launch)

    start(launches[0])
    return seconds(starts(), device)


def start(launch: Launch) -> None:
    launch.kernel[launch.grid](*launch.args, **launch.constants)


def clear_counters(launch: Launch) -> None:
    """Integer tensors are counters by which programs find out who comes last; a forward starts with them at 0."""
    for argument in launch.args:
        if isinstance(argument, Tensor) and not argument.is_floating_point():
            argument.zero_()


def make_flush(device: str, size: int) -> Callable[[], Any]:
    """A call that overwrites the cache."""
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def measure_ceilings(device: str, effort: Effort) -> tuple[dict[str, Any], Ceilings]:
    """(what the report tells, the same as Ceilings), on random data; medians of ten."""
    side = effort.product_side
    source = torch.randn(effort.copy_bytes // 2, dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(source)
    copy_s = median_of(lambda: copied.copy_(source), device)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_s = median_of(lambda: a @ b, device)
    one = torch.empty(1, device=device)
    processors, clock_ghz, clock_source = lanes_of(device)
    told = {
        "copy_gbs": 2 * source.nbytes / copy_s / 1e9,
        "product_tflops": 2 * side**3 / product_s / 1e12,
        "floor_us": 1e6 * median_of(lambda: one.fill_(1), device, make_flush(device, effort.flush_bytes)),
        "processors": processors,
        "clock_ghz": clock_ghz,
        "clock_source": clock_source,
    }
    limits = Ceilings(1e9 * told["copy_gbs"], 1e12 * told["product_tflops"], lane_rate(processors, 1e9 * clock_ghz))
    return told, limits


def median_of(call: Callable[[], Any], device: str, before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of a call; `before` is called before each and not timed."""

    def calls() -> Iterator[Callable[[], Any]]:
        for _ in range(10):
            before()
            yield call

    for _ in range(3):
        call()
    return median(seconds(calls(), device))


def lanes_of(device: str) -> tuple[int, float, str]:
    """(multiprocessors, their clock in GHz, where that is from)."""
    if device != "cuda":
        return 1, ASSUMED_CLOCK_GHZ, "assumed"
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    told = nvidia_smi("clocks.max.sm")
    if told is None or not told.isdigit():
        return processors, ASSUMED_CLOCK_GHZ, "assumed: nvidia-smi does not tell"
    return processors, int(told) / 1e3, "the highest, by nvidia-smi"
