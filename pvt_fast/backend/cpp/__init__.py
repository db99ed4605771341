"""Backend "cpp": the ops of the contract on C++ kernels (csrc/), float32 and bfloat16 on CPUs.

float16 is computed in float32: an op converts its activations on entry and its result on return, and packs its weights
for the float32 kernels. So are products of float16. With products of bfloat16 an op runs in bfloat16 throughout where
its activations are that, and else on kernels that read and write float32; parameters are converted as they are packed.

The instruction set is chosen once, at import: the best that this CPU runs, capped by the environment variable
PVT_FAST_ISA. Weights are packed for it at first use and kept until they change (see `ops.packing`).
"""

from __future__ import annotations

from ... import _C
from ...ops import Backend, WholeForward
from . import gradients
from .forward import SUPPORT, attention, head, layer_norm, mlp, patch_embed
from .instruction_sets import ISAS, isa, isas, use_isa
from .weights import log_float16

__all__ = ["BACKEND", "ISAS", "isa", "isas", "log_float16", "use_isa"]

BACKEND = Backend(
    SUPPORT,
    patch_embed,
    attention,
    mlp,
    layer_norm,
    head,
    backward=gradients.BACKWARD,
    whole=WholeForward(isa, _C.Forward),
)
