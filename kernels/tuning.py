"""Which block sizes a launch takes: config.py's, the committed table's, or the fastest of a few on this very GPU.

PVT_FAST_AUTOTUNE, read once at import:

- 0 or not set: the choice of config.py, or of tuned.json where that has an entry for the GPU's architecture.
- 1: the first launch of a kernel for its widths, dtype, architecture and size (powers of two) times the candidates on
  the launch's own arguments. The choice is remembered, also in a file for later processes (tuning_records.py).

Off is the default, as with torch.backends.cudnn.benchmark. Other block sizes add up in another order, so a tuned
result may differ in its last digits between machines, processes and batch sizes; and the first forward pass waits for
compilations and timings. The committed table does not depend on the size of a launch: a new batch compiles nothing.

Nothing is timed within a CUDA graph's capture, within `launch.recorded`, or off a GPU. There, what is known applies.
Launching several times is harmless: kernels write fresh outputs, never their inputs, and leave counters at 0.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pvt_fast.backend.dispatch import environment_switch

from .config import Config
from .launch import INTERPRETED, Chip, chip_of, dot_precision, is_recording, launch
from .tuning_records import Form, Key, Times, cache_file, logger, read_table, read_times, write_times

T = TypeVar("T")
# Runs the launch on the device, once in the time that it returns, in milliseconds.
Timer = Callable[[Callable[[], object], torch.device], float]

# A candidate replaces the default if it is faster by more than this: less is noise.
MARGIN = 0.03
REPEATS = 15
# The gates look at candidates for this architecture, and at 16-bit types: elsewhere none is offered.
_GATED = "sm_90"

# What to try beside the default: none of it spills or exceeds shared memory (GATES_ARGS=--candidates). Only what no
# other launch and no buffer depends on: not ROWS (the hidden map's padding), not head_attention's BLOCK_M (the keys of
# "self"), not BLOCK_K with HELD.
_OVERRIDES: dict[str, tuple[dict[str, int], ...]] = {
    "linear_kernel": (
        {"BLOCK_M": 128, "num_warps": 8},
        {"BLOCK_N": 128, "num_warps": 8},
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8},
        {"num_stages": 2},
        {"num_stages": 4},
    ),
    "norm_linear_kernel": (
        {"BLOCK_N": 128, "num_warps": 4},
        {"BLOCK_N": 128, "num_warps": 8},
        {"num_warps": 8},
        {"num_stages": 2},
    ),
    "norm_fc1_kernel": (
        {"BLOCK_N": 128, "num_warps": 4},
        {"BLOCK_N": 128, "num_warps": 8},
        {"num_warps": 8},
        {"num_stages": 2},
    ),
    "dwconv_fc2_kernel": ({"BLOCK_P": 16}, {"BLOCK_P": 32}, {"num_warps": 8}, {"num_warps": 4}),
    "dwconv_gelu_kernel": (
        {"BLOCK_P": 16, "num_warps": 1},
        {"BLOCK_P": 64, "num_warps": 4},
    ),
    "attention_kernel": (
        {"BLOCK_M": 64, "num_warps": 4},
        {"BLOCK_M": 64, "num_warps": 8},
        {"BLOCK_M": 128, "num_warps": 8},
        {"num_stages": 2},
    ),
    "head_attention_kernel": (
        {"num_warps": 4},
        {"num_warps": 8},
        {"num_stages": 1},
        {"num_stages": 2},
        {"num_warps": 8, "num_stages": 2},
    ),
    "patch_embed_kernel": (
        {"BLOCK_M": 64, "num_warps": 4},
        {"BLOCK_M": 64, "num_warps": 8},
        {"BLOCK_M": 128, "num_warps": 4},
        {"BLOCK_M": 128, "num_warps": 8},
        {"num_stages": 2},
    ),
    "spatial_reduction_kernel": (
        {"BLOCK_N": 64},
        {"BLOCK_N": 128, "num_warps": 8},
        {"num_warps": 8},
        {"num_stages": 2},
    ),
}


def candidates(kernel_name: str, default: Config, chip: Chip) -> list[Config]:
    """What is tried for a kernel whose default config.py gives: the default first, each once.

    A block is at most doubled: where config.py makes it small, registers are scarce.
    """
    found = [default]
    for override in _OVERRIDES.get(kernel_name, ()) if chip.arch == _GATED else ():
        shape = {**default, **override}
        larger = any(name.startswith("BLOCK") and value > 2 * default[name] for name, value in override.items())
        # with ONE_BLOCK the only loop is over heads, whose pipeline would keep two heads' weights in shared memory
        deeper = shape["num_stages"] > default["num_stages"] and default.get("ONE_BLOCK", False)
        if not larger and not deeper and shape not in found:
            found.append(shape)
    return found


def best(times: Times) -> Config:
    """The fastest, if it beats the default, which is the first, by more than MARGIN."""
    default, limit = times[0][0], times[0][1] * (1 - MARGIN)
    shape, milliseconds = min(times, key=lambda item: item[1])
    return shape if milliseconds < limit else default


def cuda_timer(start: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the launch alone, its arguments in the L2 cache where they fit, as the op before leaves them.

    Filling memory first gives the GPU work while Python launches, which else would be what is timed.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        filled = torch.empty(1 << 24, dtype=torch.float32, device=device)
        for _ in range(8):
            filled.zero_()
        start()
        begin.record()
        start()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)


def measure(offered: list[Config], start_with: Callable[[Config], object], timer: Timer, device: torch.device) -> Times:
    """Median time of each, in turns, so that a clock that changes meets all of them. What the chip cannot hold is left
    out; without the default nothing could run, so that one raises triton's OutOfResources."""
    runnable = []
    for shape in offered:
        try:
            start_with(shape)  # compiles
        except OutOfResources as error:
            if shape is offered[0]:
                raise
            logger.debug("dropped a candidate: %s: %s", shape, error)
        else:
            runnable.append(shape)
    rounds = [[timer(lambda s=shape: start_with(s), device) for shape in runnable] for _ in range(REPEATS)]
    medians = map(statistics.median, zip(*rounds, strict=True))
    return list(zip(runnable, medians, strict=True))


class Tuner:
    """The choices of one GPU: measured by `timer`, kept in memory and in the file `path`."""

    def __init__(self, path: Path, timer: Timer = cuda_timer) -> None:
        self._path, self._timer = path, timer
        self._measured = read_times(path)
        self._chosen: dict[tuple[Key, int], Config] = {}
        self._lock = threading.Lock()

    def known(self, key: Key, bucket: int, chip: Chip) -> Config | None:
        """The choice, if it was measured; None if what was measured is not among the candidates any more."""
        chosen = self._chosen.get((key, bucket))
        if chosen is None and (key, bucket) in self._measured:
            chosen = checked(best(self._measured[key, bucket]), key, chip)
            if chosen is None:
                self._measured.pop((key, bucket), None)
            else:
                self._chosen[key, bucket] = chosen
        return chosen

    def tune(
        self, key: Key, bucket: int, chip: Chip, start_with: Callable[[Config], object], device: torch.device
    ) -> Config:
        """Measure and remember."""
        with self._lock:  # two launches at once would time each other
            chosen = self.known(key, bucket, chip)
            if chosen is not None:
                return chosen
            offered = candidates(key.kernel, dict(key.default), chip)
            if len(offered) > 1:
                times = measure(offered, start_with, self._timer, device)
                # with what other processes have measured meanwhile
                self._measured = {**read_times(self._path), **self._measured, (key, bucket): times}
                write_times(self._path, self._measured)
                offered = [best(times)]
            self._chosen[key, bucket] = offered[0]
        return offered[0]


def checked(choice: Config, key: Key, chip: Chip) -> Config | None:
    """A choice that was read, if it is one of the candidates; else None, and said so."""
    for shape in candidates(key.kernel, dict(key.default), chip):
        if shape == choice:
            return shape
    logger.warning("ignored a stored choice for %s that is none of its candidates: %s", key.kernel, choice)
    return None


class _Setting(NamedTuple):
    table: dict[Key, Config]
    tuner_of: Callable[[Tensor], Tuner | None]
    applied: dict[tuple[Key, Chip], Config]  # what became of the table's entries, checked once


def _device_tuner(tensor: Tensor) -> Tuner | None:
    if not tensor.is_cuda or INTERPRETED or tensor.dtype == torch.float32:
        return None
    return _gpu_tuner(tensor.device.index)


@cache
def _gpu_tuner(index: int) -> Tuner:
    return _tuner(torch.cuda.get_device_name(index))  # one for all GPUs of that name


@cache
def _tuner(gpu: str) -> Tuner:
    return Tuner(cache_file(gpu))


def _from_environment() -> _Setting | None:
    on, table = environment_switch("PVT_FAST_AUTOTUNE"), read_table()
    return _Setting(table, _device_tuner if on else lambda tensor: None, {}) if on or table else None


# None: every launch takes config.py's choice, and nothing more is asked
_setting: _Setting | None = _from_environment()


@contextmanager
def use(tuner: Tuner | None = None, table: dict[Key, Config] | None = None) -> Iterator[None]:
    """Within the block this tuner and this table alone choose, on any device. Not for several threads at once."""
    global _setting
    before, _setting = _setting, _Setting(table or {}, lambda tensor: tuner, {})
    try:
        yield
    finally:
        _setting = before


def with_choice(
    start: Callable, kernel: Any, form: Form, tensor: Tensor, default: Config, start_with: Callable[[Config], T]
) -> T:
    """`start_with(shape)` with the shape chosen for the kernel.

    `start`: what start_with starts by; only `launch` is timed, `warm` takes what is known. `form`: what beside the
    default the kernel is compiled for, widths first. `tensor`: its dtype and size count, and its device.
    """
    if _setting is None:
        return start_with(default)
    return start_with(_choice(_setting, start, kernel, form, tensor, default, start_with))


def _choice(
    setting: _Setting,
    start: Callable,
    kernel: Any,
    form: Form,
    tensor: Tensor,
    default: Config,
    start_with: Callable[[Config], object],
) -> Config:
    chip = chip_of(tensor.device)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dot_precision(tensor.dtype) == "tf32":
        dtype = "tf32"
    key = Key(chip.arch, kernel.__name__, form, dtype, tuple(default.items()))
    tuner = setting.tuner_of(tensor)
    if tuner is not None:
        bucket = tensor.numel().bit_length()
        chosen = tuner.known(key, bucket, chip)
        if chosen is not None:
            return chosen
        if start is launch and _may_time(tensor):
            return tuner.tune(key, bucket, chip, start_with, tensor.device)
    if key not in setting.table:
        return default
    if (key, chip) not in setting.applied:
        setting.applied[key, chip] = checked(setting.table[key], key, chip) or default
    return setting.applied[key, chip]


def _may_time(tensor: Tensor) -> bool:
    if is_recording() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
