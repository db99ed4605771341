"""Weights in the forms that kernels read, packed once and kept, and which kernels those are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...ops import AttentionSpec, AttentionWeights, Linear, MlpSpec, MlpWeights, Norm, map_tensors
from ...ops.packing import Alias, packed, span

logger = logging.getLogger("pvt_fast")


class Kernels(NamedTuple):
    """Which kernels compute an op: `storage` is the dtype of what they read and write, but for norms and biases."""

    dtype: _C.DType
    storage: torch.dtype
    name: str  # of what is packed for them


_F32 = Kernels(_C.DType.f32, torch.float32, "f32")
_BF16 = Kernels(_C.DType.bf16, torch.bfloat16, "bf16")
_MIXED = Kernels(_C.DType.mixed, torch.float32, "mixed")


def kernels_for(x: torch.dtype, products: torch.dtype | None) -> Kernels:
    """Those for activations of dtype x."""
    if x is torch.bfloat16:
        return _BF16
    if products is torch.float16:
        log_float16()
    return _MIXED if products is torch.bfloat16 else _F32


def pack_op(
    kind: str,
    kernels: Kernels,
    key: tuple,
    w: Any,
    build: Callable[[Any], Any],
    check: Callable[[Any], object] = lambda weights: None,
) -> Any:
    """The packed op of weights `w`, a norm, a linear or a tuple of them. What is packed for other kernels is kept
    beside it: evaluation may run without the autocast of training.

    Where the op must be built, build(weights) sees the weights as the kernels read them, after check(weights) saw them
    as they are. Both see aliases, which no other thread can change.
    """
    tensors = tuple([tensor for part in _parts_of(w) if part is not None for tensor in part[:2]])

    def held(alias: Alias) -> Any:
        return build(_form(w, kernels, alias))

    return packed(f"{kind} {kernels.name}", key, tensors, held, lambda alias: check(map_tensors(w, alias)))


def build_op(kernels: Kernels, w: Any, build: Callable[[Any], Any]) -> Any:
    """The same for one call, not kept: of weights that change before the next."""
    return build(_form(w, kernels, torch.Tensor.detach))


def _form(w: Any, kernels: Kernels, alias: Alias) -> Any:
    """As the kernels read `w`."""
    read = [None if part is None else _as_kernels_read(map_tensors(part, alias), kernels) for part in _parts_of(w)]
    return read[0] if _is_alone(w) else type(w)(*read)


def _parts_of(w: Any) -> tuple[Norm | Linear | None, ...]:
    return (w,) if _is_alone(w) else w


def _is_alone(w: Any) -> bool:
    return isinstance(w, (Norm, Linear))


def _as_kernels_read(part: Norm | Linear, kernels: Kernels) -> Norm | Linear:
    """Matrices and kernels in the storage's dtype, norms and biases as floats, all contiguous."""
    weight = readable(part.weight)
    if isinstance(part, Norm):
        return Norm(weight.float().contiguous(), readable(part.bias).float().contiguous(), part.eps)
    weight = weight.to(kernels.storage).contiguous()
    return Linear(weight, None if part.bias is None else readable(part.bias).float().contiguous())


def readable(alias: Tensor) -> Tensor:
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


def attention_form(w: AttentionWeights, spec: AttentionSpec) -> dict[str, Any]:
    """Weights as the extension takes them, with what else it asks for."""
    return {
        **_parts(w),
        "channels": w.q.weight.shape[0],
        "heads": spec.num_heads,
        "sr_ratio": 1 if w.sr is None else w.sr.weight.shape[2],
        "linear": spec.linear,
        "scale": spec.scale,
    }


def mlp_form(w: MlpWeights, spec: MlpSpec) -> dict[str, Any]:
    """Weights as the extension takes them, with what else it asks for."""
    hidden, channels = w.fc1.weight.shape
    return {**_parts(w), "channels": channels, "hidden": hidden, "relu": spec.relu}


def _parts(w: AttentionWeights | MlpWeights) -> dict[str, tuple | None]:
    """The norms and linears of weights by their names, as the extension takes them."""
    return {
        name: None if part is None else norm_form(part) if isinstance(part, Norm) else linear_form(part)
        for name, part in w._asdict().items()
    }


def norm_form(w: Norm) -> tuple:
    return span(w.weight), span(w.bias), w.eps


def linear_form(w: Linear) -> tuple:
    return span(w.weight), span_if(w.bias)


def span_if(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else span(tensor)


def stored_scale(residual_scale: Tensor | None, kernels: Kernels) -> Tensor | None:
    """A residual_scale as the kernels read it."""
    return None if residual_scale is None else readable(residual_scale.detach()).to(kernels.storage).contiguous()
