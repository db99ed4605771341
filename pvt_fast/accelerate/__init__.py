"""The ops of the contract in place of modules' forwards: in our own model, and in models of others by `accelerate_`.

`api` is what users call; `peers` is the table of layouts, in the terms of `block_names`; `recognise` finds a block's
layout, `read` turns the block into the `halves` that call the ops, `verify` tries them out. `fused` is the forward that
stands in for a module's own, `guard` decides when it may, and `explain` tells of it.
"""

from .api import (
    AcceleratedBlock,
    AccelerationError,
    AccelerationReport,
    SkippedBlock,
    accelerate_,
    accelerated,
    restore_,
)
from .explain import Explanation, Piece, explain, refresh

__all__ = [
    "AcceleratedBlock",
    "AccelerationError",
    "AccelerationReport",
    "Explanation",
    "Piece",
    "SkippedBlock",
    "accelerate_",
    "accelerated",
    "explain",
    "refresh",
    "restore_",
]
