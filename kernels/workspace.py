"""Memory that kernels need beside their operands: partial sums, counters, and what is made once and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def workspace(device: torch.device, elements: int, tiles: int) -> tuple[Tensor, Tensor]:
    """(fp32 room for `elements` partial sums, `tiles` counters that are 0) of one launch; 0 for what is not used.

    A kernel leaves its counters at 0 (see primitives.is_last), so they are zeroed once and not in each forward: a
    stream has its own, and in a CUDA graph each launch, as graphs may be replayed side by side.
    """
    sums = torch.empty(max(elements, 1), dtype=torch.float32, device=device)
    if device.type != "cuda":
        return sums, torch.zeros(max(tiles, 1), dtype=torch.int32, device=device)
    return sums, counters(torch.cuda.current_device() if device.index is None else device.index).take(tiles)


class Counters:
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
        self.blocks.append(off_capture(zeros, self.device))
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
def counters(device: int) -> Counters:
    return Counters(device)


def off_capture(build: Callable[[], T], device: torch.device) -> T:
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
