"""Backend "triton": the contract of `pvt_fast.ops` on fused GPU kernels.

fp32, bf16 and fp16 on a CUDA device of compute capability 8.0 or more; with TRITON_INTERPRET=1 in the environment the
same kernels run as Python on CPU tensors, slowly, for tests. Importing it without Triton raises BackendUnavailable.

Launches: patch_embed 1; mlp 2 for C <= 128, and wider while tiles are few, else 3; attention 2 (3 in
the linear form), and 1 more for wide rows in few tiles; layer_norm 1; head 1 and torch's linear. An op with one form
for few tiles and one for many compiles both at first: a new batch or map size compiles nothing. How many programs share
a sum depends on the batch, and so do a result's last bits.
"""

from __future__ import annotations

from pvt_fast.ops import Backend, BackendUnavailable

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(f"triton is not installed ({error}); pip install 'pvt-fast[triton]'") from error

from .attention.forward import attention
from .head import head, layer_norm
from .launch import SUPPORT
from .mlp.forward import mlp
from .patch_embed import patch_embed

BACKEND = Backend(SUPPORT, patch_embed, attention, mlp, layer_norm, head)
