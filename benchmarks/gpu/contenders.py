"""The contenders on a GPU: the same network with the same weights; `contend` is a process's work (see `..comparison`).

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
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..case import Case
from ..comparison import Ready
from ..models import make_images, make_model, timm_model
from .clock import seconds as seconds_of
from .plan import Place

Forward = Callable[[Tensor], Tensor]

# Inputs that calls go through in turn, the first with the images whose logits are known.
INPUTS = 4
FEWEST_CALLS, MOST_CALLS = 3, 2000


class Built(NamedTuple):
    """A contender before its first call.

    `first` compiles what is to be compiled; `settle` then gives what is timed, from an example of its images. What
    they allocate counts for the peak of memory from `settle` on. `context` is in force all the while.
    """

    first: Forward
    settle: Callable[[Tensor], Forward]
    layout: torch.memory_format = torch.contiguous_format
    context: AbstractContextManager = nullcontext()


def eager(case: Case, place: Place) -> Built:
    """pvt_fast, each kernel launched from Python."""
    model = make_model(case).to(place.device, case.torch_dtype)
    model.backend = place.backend
    return Built(model, lambda example: model)


def captured(case: Case, place: Place) -> Built:
    """pvt_fast as a CUDA graph, which copies the images into its own buffer."""
    built = eager(case, place)
    return built._replace(settle=built.first.capture)


def timm_eager(case: Case, place: Place) -> Built:
    torch.backends.cudnn.benchmark = True
    model = timm_model(case).to(place.device, case.torch_dtype).to(memory_format=torch.channels_last)
    return Built(model, lambda example: model, torch.channels_last)


def compiled(case: Case, place: Place, mode: str = "max-autotune", attention: SDPBackend | None = None) -> Built:
    """timm by torch.compile, `attention` the only implementation that scaled_dot_product_attention may take."""
    inductor.autotune_num_choices_displayed = 0  # its tables would bury what is told
    call = torch.compile(timm_eager(case, place).first, mode=mode)
    context = nullcontext() if attention is None else sdpa_kernel(attention)
    return Built(call, lambda example: call, torch.channels_last, context)


BUILDS: dict[str, Callable[[Case, Place], Built]] = {
    "captured": captured,
    "eager": eager,
    "again": captured,
    "timm": timm_eager,
    "compile": compiled,
    "compile-no-graphs": partial(compiled, mode="max-autotune-no-cudagraphs"),
    "compile-flash": partial(compiled, attention=SDPBackend.FLASH_ATTENTION),
    "compile-efficient": partial(compiled, attention=SDPBackend.EFFICIENT_ATTENTION),
    "compile-cudnn": partial(compiled, attention=SDPBackend.CUDNN_ATTENTION),
}


def contend(name: str, case: Case, place: Place, rows: list[int]) -> Generator[Any, Any, None]:
    """A contender's process; its logits are those of these rows of the batch."""
    device = place.device
    built = BUILDS[name](case, place)  # weights as a user has them, no tensors of the inference mode
    with torch.inference_mode():
        example = make_images(case).to(device, case.torch_dtype).contiguous(memory_format=built.layout)
        yield None
        with built.context:
            built.first(example)
            forget_peak(device)
            forward = built.settle(example)
            for _ in range(3):  # torch.compile captures its graph in the first of them
                logits = forward(example)[rows].cpu()
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            seconds = yield Ready(logits, {"peak": peak, "note": f"peak {peak / 2**20:,.0f} MiB"})
            inputs = [example, *(torch.randn_like(example) for _ in range(INPUTS - 1))]
            pilot = burst(forward, inputs, FEWEST_CALLS, device)
            calls = max(FEWEST_CALLS, min(MOST_CALLS, round(seconds / pilot)))
            while True:
                yield [burst(forward, inputs, calls, device)]


def burst(forward: Forward, inputs: list[Tensor], calls: int, device: str) -> float:
    """Seconds a call, of that many one after the other over the inputs in turn; one call before them wakes the GPU."""

    def run() -> None:
        for index in range(calls):
            forward(inputs[index % len(inputs)])

    forward(inputs[-1])
    return seconds_of([run], device)[0] / calls


def forget_peak(device: str) -> None:
    """From here on the peak of memory is counted anew; what lies unused in torch's pools is given back first."""
    if device == "cuda":
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
