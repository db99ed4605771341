"""The contenders on a GPU: the same network with the same weights, each in a process of its own (see `server.py`).

Every one is a function of the case and the place, and nothing else decides on the device: the tests run them on a CPU.
timm's get channels-last images, which are the faster for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from case import Case
from contenders import make_images, make_model, timm_model
from gpu_plan import CONTENDERS as NAMES
from gpu_plan import Place
from stopwatch import Stopwatch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

Forward = Callable[[Tensor], Tensor]

# Inputs that calls go through in turn, the first with the images whose logits are known.
INPUTS = 4
FEWEST_CALLS, MOST_CALLS = 3, 2000


class Contestant(NamedTuple):
    """A contender before its first call.

    `first` compiles what is to be compiled; `settle` then gives what is timed, from an example of its images. What
    they allocate counts for the peak of memory from `settle` on. `context` is in force all the while.
    """

    first: Forward
    settle: Callable[[Tensor], Forward]
    channels_last: bool = False
    context: AbstractContextManager = nullcontext()


def eager(case: Case, place: Place) -> Contestant:
    """pvt_fast, each kernel launched from Python."""
    model = make_model(case).to(place.device, case.torch_dtype)
    model.backend = place.backend
    return Contestant(model, lambda example: model)


def captured(case: Case, place: Place) -> Contestant:
    """pvt_fast as a CUDA graph, which copies the images into its own buffer."""
    contestant = eager(case, place)
    return contestant._replace(settle=lambda example: contestant.first.capture(example))


def timm_eager(case: Case, place: Place) -> Contestant:
    torch.backends.cudnn.benchmark = True
    model = timm_model(case).to(place.device, case.torch_dtype).to(memory_format=torch.channels_last)
    return Contestant(model, lambda example: model, channels_last=True)


def compiled(case: Case, place: Place, mode: str, attention: SDPBackend | None = None) -> Contestant:
    """timm by torch.compile, `attention` the only implementation that scaled_dot_product_attention may take."""
    inductor.autotune_num_choices_displayed = 0  # its tables would bury what is told
    call = torch.compile(timm_eager(case, place).first, mode=mode)
    context = nullcontext() if attention is None else sdpa_kernel(attention)
    return Contestant(call, lambda example: call, channels_last=True, context=context)


MAKERS: dict[str, Callable[[Case, Place], Contestant]] = {
    "captured": captured,
    "eager": eager,
    "again": captured,
    "timm": timm_eager,
    "compile": partial(compiled, mode="max-autotune"),
    "compile-no-graphs": partial(compiled, mode="max-autotune-no-cudagraphs"),
    "compile-flash": partial(compiled, mode="max-autotune", attention=SDPBackend.FLASH_ATTENTION),
    "compile-efficient": partial(compiled, mode="max-autotune", attention=SDPBackend.EFFICIENT_ATTENTION),
    "compile-cudnn": partial(compiled, mode="max-autotune", attention=SDPBackend.CUDNN_ATTENTION),
}
assert tuple(MAKERS) == NAMES


class Ready(NamedTuple):
    """What a contender answers before it is timed; `peak` and `reserved` in bytes, None on a CPU.

    peak: most bytes in tensors at once, weights and captures included. reserved: most bytes held of the device.
    """

    logits: Tensor
    peak: int | None
    reserved: int | None


def contend(name: str, case: Case, place: Place, rows: list[int]) -> Generator[Any, Any, None]:
    """A contender's process. It answers None once weights and images lie on the device; then to requests:

    "prepare": Ready, with the logits of those rows; then a number of seconds: seconds a call, over about that long.
    Processes may load at the same time, but tune what they compile by timing it: that is done one by one.
    """
    device = place.device
    contestant = MAKERS[name](case, place)  # weights as a user has them, no tensors of the inference mode
    with torch.inference_mode():
        layout = torch.channels_last if contestant.channels_last else torch.contiguous_format
        first = make_images(case).to(device, case.torch_dtype).contiguous(memory_format=layout)
        yield None
        with contestant.context:
            contestant.first(first)
            memory = MemoryMeter(device)
            forward = contestant.settle(first)
            for _ in range(3):  # torch.compile captures its graph in the first of them
                logits = forward(first)[rows].cpu()
            seconds = yield Ready(logits, *memory.read())
            inputs = [first, *(torch.randn_like(first) for _ in range(INPUTS - 1))]
            calls = FEWEST_CALLS
            while True:
                time = burst(forward, inputs, calls, device)
                wanted = max(FEWEST_CALLS, min(MOST_CALLS, round(seconds / time)))
                if wanted > 2 * calls:  # the first burst was too short to be one
                    time = burst(forward, inputs, wanted, device)
                calls = wanted
                seconds = yield time


def burst(forward: Forward, inputs: list[Tensor], calls: int, device: str) -> float:
    """Seconds a call, of that many one after the other over the inputs in turn; one call before them wakes the GPU."""
    forward(inputs[-1])
    watch = Stopwatch(device)
    watch.start()
    for index in range(calls):
        forward(inputs[index % len(inputs)])
    watch.stop()
    return watch.seconds()[0] / calls


class MemoryMeter:
    """The most memory that is used from here on; what lies unused in torch's pools is given back first."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> tuple[int | None, int | None]:
        """(bytes in tensors, bytes held of the device)."""
        if not self._on_gpu:
            return None, None
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
