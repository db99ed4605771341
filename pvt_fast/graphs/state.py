"""What a model's forward reads, as it was at one moment, and whether all of it is still so.

Whatever does a model's forward in another way (a program, a CUDA graph, a copy with other parameters) was made of the
model in one state, and is of use while that state holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..accelerate.guard import Guard, edges, snapshot
from ..ops import packing

if TYPE_CHECKING:
    from ..model import PVT_V2


class State:
    """A model's modules with their classes, hooks and settings, and its parameters, but for their values."""

    def __init__(self, model: PVT_V2) -> None:
        _ = model.config  # which follows a replaced head when it is asked
        self.settings = model.forward_settings()
        self.guard = Guard(edges(model._modules.items()))
        soon = _lines(tuple(model.parameters()))
        self.attributes, self.kept = snapshot(model, self.guard, parameters=True, soon=soon)

    def holds(self, model: PVT_V2) -> bool:
        """Would a forward read the same now, but for the parameters' values?"""
        if not model.calls_its_own() or model.forward_settings() != self.settings:
            return False
        return model._modules is self.kept[0] and self.guard.others_hold() and self.attributes.holds(model)


class Recorded:
    """A state with its parameters' values, for what was made of them all at once."""

    def __init__(self, state: State, parameters: Sequence[Tensor]) -> None:
        self.state, self.parameters = state, parameters
        self.sources = packing.Sources(self.parameters, packing.aliases(self.parameters), keep=True)

    def holds(self, model: PVT_V2) -> bool:
        """Would a forward read the same now, as far as the guarantee of `ops.packing` goes?"""
        if not self.state.holds(model):
            return False
        if self.sources.hold_values(self.parameters):
            return True
        packing.doubt()  # of which op's weights it is that have changed
        return False

    def change(self, model: PVT_V2) -> str:
        """What does not hold, in words."""
        guard = self.state.guard
        return guard.changed(model) or guard.disturbed(model) or "its settings or parameters have changed"


def _lines(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of the cache lines that a check of `tensors` reads: of each its object, its C++ part and its storage.

    A forward leaves none of them in the inner caches, and one after another they take longer than all the rest.
    """
    dense = [t for t in tensors if t.layout is torch.strided]
    regions = [((id(t), 64), (t._cdata, 256), (t.untyped_storage()._cdata, 128)) for t in dense]
    return [start + at for regions_of in regions for start, size in regions_of for at in range(0, size, 64)]
