"""Starting kernels: on which chip, at which precision of fp32 products; and recording what is started."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from pvt_fast.ops import AttentionSpec, MlpSpec, Support
from pvt_fast.ops.packing import packed

T = TypeVar("T")

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
    name = f"sm_{properties.major}{properties.minor}"
    shared = properties.shared_memory_per_block_optin
    return Chip(name, shared, properties.multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: fp32 operands stay fp32 unless the user allows TF32 in torch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def workspace(device: torch.device, elements: int, tiles: int) -> tuple[Tensor, Tensor]:
    """(fp32 room for `elements` partial sums, `tiles` counters that are 0) of one launch; 0 for what is not used.

    A kernel leaves its counters at 0 (see primitives.is_last), so they are zeroed once and not in each forward: a
    stream has its own, and in a CUDA graph each launch, as graphs may be replayed side by side.
    """
    sums = torch.empty(max(elements, 1), dtype=torch.float32, device=device)
    if device.type != "cuda":
        return sums, torch.zeros(max(tiles, 1), dtype=torch.int32, device=device)
    return sums, _counters(torch.cuda.current_device() if device.index is None else device.index).take(tiles)


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


SUPPORT = Support("triton", (torch.float32, torch.bfloat16, torch.float16), _unsupported_device)


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


class _Counters:
    """Counters of one device, cut from blocks that live as long as the process: graphs keep addresses, not tensors."""

    BLOCK = 1 << 20  # 4 MiB

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.blocks: list[Tensor] = []
        self.streams: dict[int, Tensor] = {}
        self.used = 0
        self.lock = threading.Lock()
        self._add_block(self.BLOCK)

    def _add_block(self, count: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("triton backend: the model must run once without a CUDA graph before its capture")
        zeros = partial(torch.zeros, count, dtype=torch.int32, device=self.device)
        self.blocks.append(apart(zeros, self.device))
        self.used = 0

    def take(self, count: int) -> Tensor:
        if count == 0:
            return self.blocks[0][:4]
        with self.lock, torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                if self.used + count > len(self.blocks[-1]):
                    raise RuntimeError(
                        f"triton backend: a CUDA graph must find {count} free counters, got "
                        f"{len(self.blocks[-1]) - self.used}; run the model once without a graph and capture again"
                    )
                return self._cut(count)
            if 2 * self.used > len(self.blocks[-1]):  # so that the next capture finds room
                self._add_block(self.BLOCK)
            stream = torch.cuda.current_stream().cuda_stream
            own = self.streams.get(stream)
            if own is None or len(own) < count:
                own = self.streams[stream] = self._cut(max(count, 4096))
            return own

    def _cut(self, count: int) -> Tensor:
        count = -(-count // 4) * 4  # 16 bytes: Triton compiles aligned pointers separately
        if self.used + count > len(self.blocks[-1]):
            self._add_block(max(count, self.BLOCK))
        first, self.used = self.used, self.used + count
        return self.blocks[-1][first : self.used]


@cache
def _counters(device: int) -> _Counters:
    return _Counters(device)


def apart(build: Callable[[], T], device: torch.device) -> T:
    """What `build` makes on the device, to be kept: made in a thread of its own, and finished when this returns.

    This thread may be within a CUDA graph's memory pool, whose memory is not its own to keep, or under a mode that
    makes fake tensors; both belong to a thread. And another stream may be the first to read what was made.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return build()

    def run() -> T:
        with torch.cuda.device(device):
            made = build()
            torch.cuda.current_stream().synchronize()
        return made

    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def packed_apart(kind: str, tensors: tuple[Tensor | None, ...], build: Callable[[], T]) -> T:
    """The packed form of `tensors`, kept or from `build()`, made `apart`. The first tensor is never None."""
    assert tensors[0] is not None
    device = tensors[0].device
    given = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}

    def own(tensor: Any) -> Any:
        """A packed form lives until its weights' memory is freed: it must not be what keeps that alive."""
        shared = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in given
        return tensor.clone() if shared else tensor

    def build_own() -> T:
        form: Any = build()
        return type(form)(*map(own, form)) if isinstance(form, tuple) else own(form)

    return packed(f"triton {kind}", None, tensors, lambda _: apart(build_own, device))


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Weights as kernels read them, one element after another; views of others' memory may be spread over it."""
    return tuple(None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors)


def inputs_last(weight: Tensor) -> Tensor:
    """A convolution's weight (Cout, Cin, k, k) as (Cout, k, k, Cin)."""
    return weight.detach().permute(0, 2, 3, 1).contiguous()


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
