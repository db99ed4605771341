"""Backend "cpp": the ops of the contract on C++ kernels (csrc/), float32 and bfloat16 on CPUs.

float16 is computed in float32: an op converts its activations on entry and its result on return, and packs its weights
for the float32 kernels. So are products of float16. With products of bfloat16 an op runs in bfloat16 throughout where
its activations are that, and else on kernels that read and write float32; parameters are converted as they are packed.

The instruction set is chosen once, at import: the best that this CPU runs, capped by the environment variable
PVT_FAST_ISA. Weights are packed for it at first use and kept until they change (see `ops.packing`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..ops import (
    HW,
    PRODUCTS,
    AttentionSpec,
    AttentionWeights,
    Backend,
    BackendMisconfigured,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    Support,
    WholeForward,
    check_attention,
    check_head,
    check_layer_norm,
    check_mlp,
    check_patch_embed,
    map_tensors,
    result_dtype,
)
from ..ops.packing import Alias, key_of, packed, span

logger = logging.getLogger("pvt_fast")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SUPPORT = Support(
    "cpp",
    _DTYPES,
    lambda device: None if device == "cpu" else f"it runs on CPU tensors, got {device}",
    PRODUCTS,
)


class _Kernels(NamedTuple):
    """Which kernels compute an op: `storage` is the dtype of what they read and write, but for norms and biases."""

    dtype: _C.DType
    storage: torch.dtype
    name: str  # of what is packed for them


_F32 = _Kernels(_C.DType.f32, torch.float32, "f32")
_BF16 = _Kernels(_C.DType.bf16, torch.bfloat16, "bf16")
_MIXED = _Kernels(_C.DType.mixed, torch.float32, "mixed")


def _kernels(x: torch.dtype, products: torch.dtype | None) -> _Kernels:
    """Those for activations of dtype x."""
    if x is torch.bfloat16:
        return _BF16
    if products is torch.float16:
        log_float16()
    return _MIXED if products is torch.bfloat16 else _F32


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


# The cap itself: a CPU runs every ISA below its best.
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


def patch_embed(
    image: Tensor, w: PatchEmbedWeights, stride: int, products: torch.dtype | None = None
) -> tuple[Tensor, HW]:
    """LayerNorm(conv(image)); see `reference.patch_embed`."""
    hw = check_patch_embed(image, w, stride, products, plain=True, packed=True)
    _require_runs("patch_embed", image)
    isa, given = _isa, image.detach()
    # the result has the products' dtype, so the image may have it
    kernels = _kernels(torch.bfloat16 if products is torch.bfloat16 else image.dtype, products)
    image = _readable(given).to(kernels.storage)
    channels, in_channels, kernel, _ = w.proj.weight.shape
    strides = image.stride()
    channels_last = strides[1] == 1 and strides[3] == in_channels
    if not channels_last and strides[3] != 1:
        image = image.clone(memory_format=torch.contiguous_format)  # contiguous(): any stride will do for a side of 1
        strides = image.stride()

    def check(weights: Any) -> None:
        check_patch_embed(given, weights, stride, products, plain=True)

    def build(held: Any) -> Any:
        sizes = (in_channels, channels, kernel, stride)
        return _C.PatchEmbed(isa, kernels.dtype, _linear(held.proj), _norm(held.norm), sizes, channels_last)

    kind = "patch_embed channels_last" if channels_last else "patch_embed"
    op = _packed(kind, kernels, key_of(isa, w, stride), w, check, build)
    out = torch.empty((image.shape[0], hw[0] * hw[1], channels), dtype=image.dtype, device=image.device)
    op.run(span(image), (image.shape[0], *image.shape[2:]), strides, span(out))
    return out.to(result_dtype("patch_embed", "cpu", given.dtype, products)), hw


def attention(
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x + proj(softmax(q k^T * scale) v); see `reference.attention`."""
    check_attention(x, hw, w, spec, residual_scale, products, plain=True, packed=True)
    _require_runs("attention", x, spec)
    isa, given, kernels = _isa, x.detach(), _kernels(x.dtype, products)
    x = _readable(given).contiguous()

    def check(weights: Any) -> None:
        check_attention(given, hw, weights, spec, None, products, plain=True)

    def build(held: Any) -> Any:
        weights = {
            **_parts(held),
            "channels": x.shape[2],
            "heads": spec.num_heads,
            "sr_ratio": 1 if held.sr is None else held.sr.weight.shape[2],
            "linear": spec.linear,
            "scale": spec.scale,
        }
        return _C.attention(isa, kernels.dtype, weights)

    op = _packed("attention", kernels, key_of(isa, w, spec), w, check, build)
    return _run_residual(op, x, hw, residual_scale).to(given.dtype)


def mlp(
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x + fc2(gelu(dwconv3x3([relu] fc1(LayerNorm(x))))); see `reference.mlp`."""
    check_mlp(x, hw, w, spec, residual_scale, products, plain=True, packed=True)
    _require_runs("mlp", x, spec)
    isa, given, kernels = _isa, x.detach(), _kernels(x.dtype, products)
    x = _readable(given).contiguous()

    def check(weights: Any) -> None:
        check_mlp(given, hw, weights, spec, None, products, plain=True)

    def build(held: Any) -> Any:
        weights = {
            **_parts(held),
            "channels": x.shape[2],
            "hidden": held.fc1.weight.shape[0],
            "relu": spec.relu,
        }
        return _C.mlp(isa, kernels.dtype, weights)

    op = _packed("mlp", kernels, key_of(isa, w, spec), w, check, build)
    return _run_residual(op, x, hw, residual_scale).to(given.dtype)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """LayerNorm over the last dimension; see `reference.layer_norm`."""
    check_layer_norm(x, w, plain=True, packed=True)
    _require_runs("layer_norm", x)
    isa, given, kernels = _isa, x.detach(), _kernels(x.dtype, None)
    x = _readable(given).contiguous()

    def check(weights: Any) -> None:
        check_layer_norm(given, weights, plain=True)

    def build(held: Norm) -> Any:
        return _C.LayerNorm(isa, kernels.dtype, _norm(held), x.shape[-1])

    op = _packed("layer_norm", kernels, key_of(isa, w), w, check, build)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    op.run(span(x), x.numel() // x.shape[-1], span(out))
    return out.to(given.dtype)


def head(x: Tensor, w: Linear | None, products: torch.dtype | None = None) -> Tensor:
    """Mean over tokens, then the classifier; see `reference.head`."""
    check_head(x, w, products, plain=True, packed=True)
    _require_runs("head", x)
    isa, given, kernels = _isa, x.detach(), _kernels(x.dtype, products)
    x = _readable(given).contiguous()
    batch, tokens, channels = x.shape
    classes = channels if w is None else w.weight.shape[0]

    def check(weights: Any) -> None:
        check_head(given, weights, products, plain=True)

    def build(held: Linear) -> Any:
        return _C.Head(isa, kernels.dtype, _linear(held), channels, classes)

    if w is None:
        op = _C.Head(isa, kernels.dtype, None, channels, classes)
    else:
        op = _packed("head", kernels, key_of(isa, w), w, check, build)
    out = torch.empty((batch, classes), dtype=x.dtype, device=x.device)
    op.run(span(x), batch, tokens, span(out))
    return out.to(result_dtype("head", "cpu", given.dtype, products, classifies=w is not None))


def _packed(
    kind: str, kernels: _Kernels, key: tuple, w: Any, check: Callable[[Any], object], build: Callable[[Any], Any]
) -> Any:
    """The packed op of weights `w`, a norm, a linear or a tuple of them. What is packed for other kernels is kept
    beside it: evaluation may run without the autocast of training.

    Where the op must be built, check(weights) sees the weights as they are, and build(weights) as the kernels read
    them. Both see aliases, which no other thread can change.
    """
    alone = isinstance(w, (Norm, Linear))
    parts = (w,) if alone else w

    def held(alias: Alias) -> Any:
        read = [None if part is None else _as_kernels_read(map_tensors(part, alias), kernels) for part in parts]
        return build(read[0] if alone else type(w)(*read))

    tensors = tuple([tensor for part in parts if part is not None for tensor in part[:2]])
    return packed(f"{kind} {kernels.name}", key, tensors, held, lambda alias: check(map_tensors(w, alias)))


def _as_kernels_read(part: Norm | Linear, kernels: _Kernels) -> Norm | Linear:
    """Matrices and kernels in the storage's dtype, norms and biases as floats, all contiguous."""
    weight = _readable(part.weight)
    if isinstance(part, Norm):
        return Norm(weight.float().contiguous(), _readable(part.bias).float().contiguous(), part.eps)
    weight = weight.to(kernels.storage).contiguous()
    return Linear(weight, None if part.bias is None else _readable(part.bias).float().contiguous())


def _run_residual(op: Any, x: Tensor, hw: HW, residual_scale: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = None if residual_scale is None else _readable(residual_scale.detach()).to(x.dtype).contiguous()
    op.run(span(x), x.shape[0], *hw, None if scale is None else span(scale), span(out))
    return out


def _require_runs(op: str, x: Tensor, spec: AttentionSpec | MlpSpec | None = None) -> None:
    if x.device.type != "cpu" or x.dtype not in _DTYPES or (spec is not None and spec.drops):
        _SUPPORT.require(op, x.device.type, x.dtype, spec)  # the same questions, slower, and the error


def _readable(alias: Tensor) -> Tensor:
    """The values as the kernels read them: float16 as float32, a negative-bit view with its values in memory. `alias`
    must be the caller's own, so that no other thread can put other memory into it.
    """
    if alias.is_neg():
        alias = alias.resolve_neg()
    if alias.dtype != torch.float16:
        return alias
    log_float16()
    return alias.float()


@cache
def log_float16() -> None:
    logger.info("backend 'cpp' computes float16 in float32, by conversion")


def _parts(w: AttentionWeights | MlpWeights) -> dict[str, tuple | None]:
    """The norms and linears of weights by their names, as the extension takes them."""
    return {
        name: None if part is None else _norm(part) if isinstance(part, Norm) else _linear(part)
        for name, part in w._asdict().items()
    }


def _norm(w: Norm) -> tuple:
    return span(w.weight), span(w.bias), w.eps


def _linear(w: Linear) -> tuple:
    return span(w.weight), None if w.bias is None else span(w.bias)


BACKEND = Backend(_SUPPORT, patch_embed, attention, mlp, layer_norm, head, whole=WholeForward(isa, _C.Forward))
