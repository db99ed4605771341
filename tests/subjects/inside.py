"""What tests look at within models, where no name is public: each such name stands here and nowhere else."""

from __future__ import annotations

from torch import nn

from pvt_fast import PVT_V2
from pvt_fast.accelerate.fused import StandIn
from pvt_fast.graphs.program import Program


def program_of(model: PVT_V2) -> Program | None:
    """The recorded forward that the model keeps, if there is one."""
    return model._whole.program


def stand_in_of(module: nn.Module) -> StandIn:
    """What may stand in for a patch embed or block of ours."""
    return module._fused
