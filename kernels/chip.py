"""The GPU that block sizes and grids are chosen for."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What block sizes and grids depend on of a GPU."""

    arch: str  # "sm_90", "gfx942"
    shared: int  # bytes of shared memory that one block may use
    processors: int  # streaming multiprocessors, or compute units


# What the interpreter, and a recording on tensors without memory, pretend to have: an H100's or H200's.
PRETENDED = Chip("sm_90", 227 * 1024, 132)


@cache
def device_chip(index: int) -> Chip:
    """That of CUDA device `index`."""
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    shared = properties.shared_memory_per_block_optin
    return Chip(name, shared, properties.multi_processor_count)
