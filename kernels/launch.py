"""Starting kernels: on which chip, at which precision of fp32 products; and recording what is started."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pvt_fast.ops import PRODUCTS, AttentionSpec, MlpSpec, Support

from .chip import PRETENDED, Chip, device_chip

# With TRITON_INTERPRET=1 kernels run in Python on tensors of any device. Triton reads it when a kernel is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)


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


def chip_of(device: torch.device) -> Chip:
    """The GPU that kernels on this device run on."""
    if _recording is not None and _recording.chip is not None:
        return _recording.chip
    if device.type != "cuda":
        return PRETENDED
    return device_chip(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: fp32 operands stay fp32 unless the user allows TF32 in torch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _unsupported_device(device: str) -> str | None:
    """Why these kernels cannot run on a device of this type, or None."""
    if device != "cuda" and not INTERPRETED:
        return f"the kernels need a CUDA device, got {device} (TRITON_INTERPRET=1 interprets them on any)"
    return None if INTERPRETED or _recording is not None else _unsupported_gpu()


@cache
def _unsupported_gpu() -> str | None:
    if torch.version.hip is not None:
        return "the kernels are not for ROCm yet: its barrier, in Triton 3.6, does not wait for a program's stores"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the kernels need a GPU of compute capability 8.0, got {major}.{minor}"
    return None


SUPPORT = Support("triton", (torch.float32, torch.bfloat16, torch.float16), _unsupported_device, PRODUCTS)


def require_runs(op: str, x: Tensor, spec: AttentionSpec | MlpSpec | None = None) -> None:
    """BackendUnavailable unless the kernels run on x, with this spec. A recording needs no device."""
    SUPPORT.require(op, x.device.type if _recording is None else "cuda", x.dtype, spec)


def operands(
    op: str, x: Tensor, residual_scale: Tensor | None = None, spec: AttentionSpec | MlpSpec | None = None
) -> tuple[Tensor, Tensor | None]:
    """x and residual_scale as kernels read them, of one dtype and dense; BackendUnavailable as `require_runs`."""
    require_runs(op, x, spec)
    scale = None if residual_scale is None else residual_scale.to(x.dtype).resolve_neg().contiguous()
    return x.resolve_neg().contiguous(), scale


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
