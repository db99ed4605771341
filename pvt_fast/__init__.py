"""pvt_fast: Pyramid Vision Transformer v2 on fused kernels.

import pvt_fast
model = pvt_fast.pvt_v2_b2().eval()
logits = model(image)  # image (B, 3, H, W)
"""

from .cli import interrupt as _interrupt  # noqa: F401, I001  # first: the command ends on Ctrl-C
from . import _install  # noqa: F401  # says when this copy of the package cannot work
from ._earlier import earlier_module as __getattr__  # noqa: F401  # pvt_fast.cpp and others
from ._version import __version__
from .accelerate import (
    AcceleratedBlock,
    AccelerationError,
    AccelerationReport,
    Explanation,
    Piece,
    SkippedBlock,
    accelerate_,
    accelerated,
    explain,
    refresh,
    restore_,
)
from .backend.dispatch import BackendStatus, BackendUnavailable, backends, use_backend
from .model import PVT_V2
from .ops.packing import UnannouncedChange, checked_weights
from .variants import (
    create_model,
    list_models,
    pvt_v2_b0,
    pvt_v2_b1,
    pvt_v2_b2,
    pvt_v2_b2_li,
    pvt_v2_b3,
    pvt_v2_b4,
    pvt_v2_b5,
)
from .checkpoints.fitting import LoadReport
from .checkpoints.weights import export_weights, load_weights

__all__ = [
    "PVT_V2",
    "AcceleratedBlock",
    "AccelerationError",
    "AccelerationReport",
    "BackendStatus",
    "BackendUnavailable",
    "Explanation",
    "LoadReport",
    "Piece",
    "SkippedBlock",
    "UnannouncedChange",
    "__version__",
    "accelerate_",
    "accelerated",
    "backends",
    "checked_weights",
    "create_model",
    "explain",
    "export_weights",
    "list_models",
    "load_weights",
    "pvt_v2_b0",
    "pvt_v2_b1",
    "pvt_v2_b2",
    "pvt_v2_b2_li",
    "pvt_v2_b3",
    "pvt_v2_b4",
    "pvt_v2_b5",
    "refresh",
    "restore_",
    "use_backend",
]
