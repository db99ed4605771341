"""Starting kernels: on which device, with how much shared memory, at which precision of fp32 products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

# With TRITON_INTERPRET=1 kernels run in Python on tensors of any device. Triton reads it when a kernel is defined.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# What the interpreter pretends to have: an sm_90's 227 KiB per block.
_INTERPRETER_SHARED = 227 * 1024


@cache
def _device_shared(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    # ROCm has no opt-in limit above the plain one
    return max(getattr(properties, "shared_memory_per_block_optin", 0), properties.shared_memory_per_block)


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return _INTERPRETER_SHARED
    return _device_shared(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products: fp32 operands stay fp32 unless the user allows TF32 in torch."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel[grid](*args, **constants)` on the device of `tensor`."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)
