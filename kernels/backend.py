"""Backend "triton": the contract of `pvt_fast.ops` on fused GPU kernels.

fp32, bf16 and fp16 on a CUDA device of compute capability 8.0 or more; with TRITON_INTERPRET=1 in the environment the
same kernels run as Python on CPU tensors, slowly, for tests. Importing it without Triton raises BackendUnavailable.

Launches: overlap_patch_embed 1; dwconv_mlp 2 for C <= 128, and wider while tiles are few, else 3; sr_attention 2 (3 in
the linear form), and 1 more for wide rows in few tiles; layer_norm 1; head 1 and torch's linear. An op with one form
for few tiles and one for many compiles both at first: a new batch or map size compiles nothing. How many programs share
a sum depends on the batch, and so do a result's last bits.
"""

from __future__ import annotations

import torch

from pvt_fast.dispatch import BackendUnavailable, Facts

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(f"triton is not installed ({error}); pip install 'pvt-fast[triton]'") from error

from .dwconv_mlp import dwconv_mlp
from .launch import INTERPRETED
from .norm_head import head, layer_norm
from .overlap_patch_embed import overlap_patch_embed
from .sr_attention import sr_attention

__all__ = ["dwconv_mlp", "head", "layer_norm", "overlap_patch_embed", "sr_attention", "unsupported"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(facts: Facts) -> str | None:
    """Why these kernels cannot run on such an input, or None."""
    if facts.device != "cuda" and not INTERPRETED:
        return f"the kernels need a CUDA device, got {facts.device} (TRITON_INTERPRET=1 interprets them on any)"
    if facts.dtype not in _DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {str(facts.dtype).removeprefix('torch.')}"
    if facts.dropout:
        return "the kernels have no dropout; set drop_rate and attn_drop_rate to 0 or use backend 'reference'"
    if facts.autocast:
        return "the kernels run in the dtype of the weights; cast the model (model.bfloat16()) instead of autocast"
    if not INTERPRETED and torch.version.hip is not None:
        return "the kernels are not for ROCm yet: its barrier, in Triton 3.6, does not wait for a program's stores"
    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the kernels need a GPU of compute capability 8.0, got {major}.{minor}"
    return None
