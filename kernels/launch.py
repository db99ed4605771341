"""Starting kernels: on which chip, at which precision of fp32 products; and recording what is started."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# With TRITON_INTERPRET=1 kernels run in Python on tensors of any device. Triton reads it when a kernel is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Chip(NamedTuple):
    """What block sizes and grids depend on of a GPU."""

    arch: str  # "sm_90", "gfx942"
    shared: int  # bytes of shared memory that one block may use
    processors: int  # streaming multiprocessors, or compute units


# What the interpreter, and a recording on tensors without memory, pretend to have: an H100's or H200's.
PRETENDED = Chip("sm_90", 227 * 1024, 132)


class Launch(NamedTuple):
    """One start of a kernel: `kernel[grid](*args, **constants)`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class _Recording(NamedTuple):
    launches: list[Launch]
    ahead: list[Launch]
    chip: Chip | None


_recording: _Recording | None = None


@contextmanager
def recorded(chip: Chip | None = None, ahead: list[Launch] | None = None) -> Iterator[list[Launch]]:
    """Within the block every launch is kept in the list, in order, with its arguments alive.

    A recording around this one gets them at its end. Launches on meta tensors are not run. `chip`: take that for the
    device's, which is how the launches of a GPU that is not there are made. `ahead`: a list that gets what `warm`
    compiles. Not for several threads at once.
    """
    global _recording
    before, _recording = _recording, _Recording([], [] if ahead is None else ahead, chip)
    try:
        yield _recording.launches
    finally:
        if before is not None:
            before.launches.extend(_recording.launches)
        _recording = before


def is_recording() -> bool:
    """Whether this is within `recorded`."""
    return _recording is not None


def chip_of(device: torch.device) -> Chip:
    """The GPU that kernels on this device run on."""
    if _recording is not None and _recording.chip is not None:
        return _recording.chip
    if device.type != "cuda":
        return PRETENDED
    return _device_chip(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _device_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    # ROCm has no opt-in limit above the plain one
    shared = max(getattr(properties, "shared_memory_per_block_optin", 0), properties.shared_memory_per_block)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    # now, not in the first launch that wants counters, which may be within the memory pool of a CUDA graph
    _counters(index)
    return Chip(name, shared, properties.multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: fp32 operands stay fp32 unless the user allows TF32 in torch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def workspace(device: torch.device, elements: int, tiles: int) -> tuple[Tensor, Tensor]:
    """(fp32 room for `elements` partial sums, `tiles` counters that are 0) of one launch; 0 for what is not used.

    A kernel leaves its counters at 0 (see primitives.is_last), so they are zeroed once and not in each forward: a
    stream has its own, and in a CUDA graph each launch, as graphs may be replayed side by side.
    """
    partial = torch.empty(max(elements, 1), dtype=torch.float32, device=device)
    if device.type != "cuda":
        return partial, torch.zeros(max(tiles, 1), dtype=torch.int32, device=device)
    return partial, _counters(torch.cuda.current_device() if device.index is None else device.index).take(tiles)


class _Counters:
    """Counters of one device, cut from blocks that live as long as the process."""

    BLOCK = 1 << 20  # 4 MiB

    def __init__(self, device: int) -> None:
        self.device = device
        self.streams: dict[int, Tensor] = {}
        self._new_block(self.BLOCK)

    def _new_block(self, count: int) -> None:
        self.block = torch.zeros(count, dtype=torch.int32, device=f"cuda:{self.device}")
        self.used = 0

    def take(self, count: int) -> Tensor:
        if count == 0:
            return self.block[:4]
        if torch.cuda.is_current_stream_capturing():
            return self._cut(count)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        own = self.streams.get(stream)
        if own is None or len(own) < count:
            own = self.streams[stream] = self._cut(max(count, 4096))
        return own

    def _cut(self, count: int) -> Tensor:
        count = -(-count // 4) * 4  # 16 bytes: Triton compiles aligned pointers separately
        if self.used + count > len(self.block):
            self._new_block(max(count, self.BLOCK))
        self.used += count
        return self.block[self.used - count : self.used]


@cache
def _counters(device: int) -> _Counters:
    return _Counters(device)


_seen: set[Hashable] = set()


def first_time(key: Hashable) -> bool:
    """Whether `key` is asked for the first time in this process; in a recording always."""
    if _recording is not None:
        return True
    new = key not in _seen
    _seen.add(key)
    return new


def warm(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **constants: Any) -> None:
    """Compile what `launch` with these arguments would run: the other form of an op that has one for small batches and
    one for large, so that a new batch or image size compiles nothing."""
    if _recording is not None:
        _recording.ahead.append(Launch(kernel, grid, args, constants))
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            kernel.warmup(*args, grid=grid, **constants)


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel[grid](*args, **constants)` on the device of `tensor`."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, constants))
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **constants)
    elif tensor.device.type != "meta":
        kernel[grid](*args, **constants)
