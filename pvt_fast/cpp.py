"""Backend "cpp": the ops of the contract on C++ kernels (csrc/), float32 and bfloat16 on CPUs.

float16 is computed in float32: an op converts its activations on entry and its result on return, and packs its weights
for the float32 kernels.

The instruction set is chosen once, at import: the best that this CPU runs, capped by the environment variable
PVT_FAST_ISA. Weights are packed for it at first use and kept until they change (see `ops.packing`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .dispatch import BackendMisconfigured, BackendUnavailable, Facts
from .ops import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    check_attention,
    check_head,
    check_layer_norm,
    check_mlp,
    check_patch_embed,
)
from .ops.packing import packed

logger = logging.getLogger("pvt_fast")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every instruction set that is built in, best first; `isas` tells which of them this CPU runs.
ISAS: list[str] = _C.built_isas()


def isas() -> list[str]:
    """The instruction sets that this CPU runs, best first."""
    return _C.runnable_isas()


def isa() -> str:
    """The instruction set in use."""
    return _isa


def _check_isa(name: str, source: str) -> str:
    if name not in isas():
        raise BackendMisconfigured(f"{source} must be one that this CPU runs ({', '.join(isas())}), got {name!r}")
    return name


# A cap is an ISA by name: the best not above it is that one itself, as a CPU runs all below its best.
_isa = _check_isa(os.environ.get("PVT_FAST_ISA") or isas()[0], "PVT_FAST_ISA")


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, ops run on instruction set `name`; BackendMisconfigured if this CPU cannot run it.

    For tests and comparisons: it holds for the whole process, and weights are packed anew at each change.
    """
    global _isa
    before, _isa = _isa, _check_isa(name, "use_isa: name")
    try:
        yield
    finally:
        _isa = before


def unsupported(facts: Facts) -> str | None:
    """Why these facts cannot run here, or None."""
    if facts.device != "cpu":
        return f"it runs on CPU tensors, got {facts.device}"
    if facts.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, got {facts.dtype}"
    if facts.dropout:
        return "it has no dropout; training with drop_rate or attn_drop_rate above 0 runs on the reference"
    if facts.autocast:
        return "autocast is on; cast the model instead, with model.to(torch.bfloat16)"
    return None


def overlap_patch_embed(image: Tensor, w: PatchEmbedWeights, stride: int) -> tuple[Tensor, HW]:
    """LayerNorm(conv(image)); see `reference.overlap_patch_embed`."""
    hw = check_patch_embed(image, w, stride)
    dtype, image = image.dtype, _widened(image)
    channels, in_channels, kernel, _ = w.proj.weight.shape
    strides = image.stride()
    channels_last = strides[1] == 1 and strides[3] == in_channels
    if not channels_last and strides[3] != 1:
        image = image.contiguous()
        strides = image.stride()

    def build() -> Any:
        with _Addresses() as at:
            sizes = (in_channels, channels, kernel, stride)
            return _C.PatchEmbed(_isa, at.bf16(image), at.linear(w.proj), at.norm(w.norm), sizes, channels_last)

    tensors = (*w.proj[:2], *w.norm[:2])
    kind = "patch_embed channels_last" if channels_last else "patch_embed"
    op = packed(kind, (_isa, w.norm.eps, stride), tensors, build)
    out = torch.empty((image.shape[0], hw[0] * hw[1], channels), dtype=image.dtype, device=image.device)
    op.run(image.data_ptr(), (image.shape[0], *image.shape[2:]), strides, out.data_ptr())
    return out.to(dtype), hw


def sr_attention(
    x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None = None
) -> Tensor:
    """x + proj(softmax(q k^T * scale) v); see `reference.sr_attention`."""
    check_attention(x, hw, w, spec, residual_scale)
    _refuse_dropout("sr_attention", spec.attn_drop, spec.proj_drop)

    def build() -> Any:
        with _Addresses() as at:
            weights = {
                "norm": at.norm(w.norm),
                "q": at.linear(w.q),
                "kv": at.linear(w.kv),
                "sr": None if w.sr is None else at.linear(w.sr),
                "sr_norm": None if w.sr_norm is None else at.norm(w.sr_norm),
                "proj": at.linear(w.proj),
                "channels": x.shape[2],
                "heads": spec.num_heads,
                "sr_ratio": 1 if w.sr is None else w.sr.weight.shape[2],
                "linear": spec.linear,
                "scale": spec.scale,
            }
            return _C.attention(_isa, at.bf16(x), weights)

    sr = () if w.sr is None or w.sr_norm is None else (*w.sr[:2], *w.sr_norm[:2])
    tensors = (*w.norm[:2], *w.q[:2], *w.kv[:2], *w.proj[:2], *sr)
    eps = (w.norm.eps, None if w.sr_norm is None else w.sr_norm.eps)
    op = packed("attention", (_isa, eps, spec), tensors, build)
    return _run_residual(op, x, hw, residual_scale)


def dwconv_mlp(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None = None) -> Tensor:
    """x + fc2(gelu(dwconv3x3([relu] fc1(LayerNorm(x))))); see `reference.dwconv_mlp`."""
    check_mlp(x, hw, w, residual_scale)
    _refuse_dropout("dwconv_mlp", spec.drop)

    def build() -> Any:
        with _Addresses() as at:
            weights = {
                "norm": at.norm(w.norm),
                "fc1": at.linear(w.fc1),
                "dwconv": at.linear(w.dwconv),
                "fc2": at.linear(w.fc2),
                "channels": x.shape[2],
                "hidden": w.fc1.weight.shape[0],
                "relu": spec.relu,
            }
            return _C.mlp(_isa, at.bf16(x), weights)

    tensors = (*w.norm[:2], *w.fc1[:2], *w.dwconv[:2], *w.fc2[:2])
    op = packed("mlp", (_isa, w.norm.eps, spec), tensors, build)
    return _run_residual(op, x, hw, residual_scale)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """LayerNorm over the last dimension; see `reference.layer_norm`."""
    check_layer_norm(x, w)
    dtype, x = x.dtype, _widened(x).contiguous()

    def build() -> Any:
        with _Addresses() as at:
            return _C.LayerNorm(_isa, at.bf16(x), at.norm(w), x.shape[-1])

    op = packed("layer_norm", (_isa, w.eps), w[:2], build)
    out = torch.empty_like(x)
    op.run(x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr())
    return out.to(dtype)


def head(x: Tensor, w: Linear | None) -> Tensor:
    """Mean over tokens, then the classifier; see `reference.head`."""
    check_head(x, w)
    dtype, x = x.dtype, _widened(x).contiguous()
    batch, tokens, channels = x.shape
    classes = channels if w is None else w.weight.shape[0]

    def build() -> Any:
        with _Addresses() as at:
            return _C.Head(_isa, at.bf16(x), (0, 0) if w is None else at.linear(w), channels, classes)

    op = build() if w is None else packed("head", _isa, w[:2], build)
    out = torch.empty((batch, classes), dtype=x.dtype, device=x.device)
    op.run(x.data_ptr(), batch, tokens, out.data_ptr())
    return out.to(dtype)


def _run_residual(op: Any, x: Tensor, hw: HW, residual_scale: Tensor | None) -> Tensor:
    dtype, x = x.dtype, _widened(x).contiguous()
    out = torch.empty_like(x)
    if residual_scale is None:
        op.run(x.data_ptr(), x.shape[0], *hw, 0, out.data_ptr())
    else:
        residual_scale = residual_scale.to(x.dtype).contiguous()
        op.run(x.data_ptr(), x.shape[0], *hw, residual_scale.data_ptr(), out.data_ptr())
    return out.to(dtype)


def _widened(x: Tensor) -> Tensor:
    """The tensor in a dtype that the kernels have: float16 as float32."""
    if x.dtype != torch.float16:
        return x
    _log_float16()
    return x.float()


@cache
def _log_float16() -> None:
    logger.info("backend 'cpp' computes float16 in float32, by conversion")


def _refuse_dropout(op: str, *rates: float) -> None:
    if any(rates):
        raise BackendUnavailable(f"{op}: dropout must be 0 on the cpp backend, got {max(rates)}")


class _Addresses:
    """Addresses of dense weights for the packing call inside the `with` block, which keeps the tensors alive."""

    def __enter__(self) -> _Addresses:
        self._alive: list[Tensor] = []
        return self

    def __exit__(self, *exc: object) -> None:
        self._alive.clear()

    def bf16(self, x: Tensor) -> bool:
        return x.dtype == torch.bfloat16

    def norm(self, w: Norm) -> tuple[int, int, float]:
        return self._of(w.weight), self._of(w.bias), w.eps

    def linear(self, w: Linear) -> tuple[int, int]:
        return self._of(w.weight), self._of(w.bias)

    def _of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            raise TypeError(f"cpp: weights must be plain tensors on the CPU, got a {type(tensor).__name__}")
        self._alive.append(_widened(tensor.detach()).contiguous())
        return self._alive[-1].data_ptr()
