"""What compilers and exporters need beside plain torch: two operators in forms that they take at any size, and a mark
for answers that they are not to trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import LINEAR_POOL_SIZE
from .contract import Linear

Answer = TypeVar("Answer", bound=Callable)


def constant_while_traced(answer: Answer) -> Answer:
    """Let the compiler call `answer` while it traces and keep what it returns, without guards on what that read.

    This is all that torch.compiler.assume_constant_result does; but to call that imports torch._dynamo, which takes
    seconds in every process. tests/graphs/test_compile.py fails where the mark has another name.
    """
    vars(answer)["_dynamo_marked_constant"] = True
    return answer


def conv2d(image: Tensor, conv: Linear, **options: int) -> Tensor:
    """F.conv2d of a map (B, Cin, H, W) with a kernel (Cout, Cin / groups, k, k), whose gradient has its strides.

    A channels-last map makes the gradient of a (C, 1, 3, 3) kernel one of strides (9, 1, 3, 1), not (9, 9, 3, 1): the
    same memory, but DistributedDataParallel compares strides, warns and copies. Through two views it has the kernel's.
    """
    kernel = conv.weight.flatten(1).unflatten(1, conv.weight.shape[1:])
    return F.conv2d(convolvable(image), kernel, conv.bias, **options)


def convolvable(image: Tensor) -> Tensor:
    """The same map in a form that compilers can convolve."""
    # inductor (torch 2.13) fails on a convolution of a channels-last view whose sizes are symbols
    return image.contiguous() if _sizes_are_symbols(image) else image


def adaptive_pool(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 7, 7): means of adaptive bins, which overlap where 7 does not divide the size."""
    if not exporting_to_onnx() and not _sizes_are_symbols(image):
        return F.adaptive_avg_pool2d(image, LINEAR_POOL_SIZE)
    # ONNX has fixed windows only, and inductor fixes the windows of the first size: two products are the same sums
    rows, columns = (averages(size, image) for size in image.shape[2:])
    return rows @ image @ columns.T


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is at work; asked only where it may be, as torch's answer imports the exporter."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def averages(size: int, like: Tensor) -> Tensor:
    """(7, size): row i averages the places [floor(i * size / 7), ceil((i + 1) * size / 7))."""
    bins = torch.arange(LINEAR_POOL_SIZE, device=like.device).unsqueeze(1)
    places = torch.arange(size, device=like.device)
    starts, ends = bins * size // LINEAR_POOL_SIZE, ((bins + 1) * size + LINEAR_POOL_SIZE - 1) // LINEAR_POOL_SIZE
    return ((places >= starts) & (places < ends)).to(like.dtype) / (ends - starts).to(like.dtype)


def _sizes_are_symbols(image: Tensor) -> bool:
    """Is this being traced for any height and width?

    The compiler does not say. But of a size that is a number it knows the remainder of every division, of a symbol
    only where that is declared a multiple of every divisor tried here.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # not for every process: it loads sympy

    return not all(
        any(statically_known_true(size % divisor == rest) for rest in range(divisor))
        for size in image.shape[2:]
        for divisor in (2, 3, 5, 7, 11)
    )
