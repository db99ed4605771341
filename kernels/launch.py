"""Starting kernels: on which chip, at which precision of fp32 products; and recording what is started."""

from __future__ import annotations

from collections.abc import Iterator
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
    chip: Chip | None


_recording: _Recording | None = None


@contextmanager
def recorded(chip: Chip | None = None) -> Iterator[list[Launch]]:
    """Within the block every launch is kept in the list, in order, with its arguments alive.

    Launches on meta tensors are not run. `chip`: take that for the device's, which is how the launches of a GPU that is
    not there are made. Not for several threads at once.
    """
    global _recording
    before, _recording = _recording, _Recording([], chip)
    try:
        yield _recording.launches
    finally:
        _recording = before


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
    return Chip(name, shared, properties.multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: fp32 operands stay fp32 unless the user allows TF32 in torch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel[grid](*args, **constants)` on the device of `tensor`."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, constants))
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **constants)
    elif tensor.device.type != "meta":
        kernel[grid](*args, **constants)
