"""Gradients of the ops on C++ kernels: `Backward` of the contract.

Each packs its weights anew for the backward, beside the form that the forward keeps: the kernels recompute what the
forward did not keep, and then need both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..ops import HW, AttentionSpec, AttentionWeights, MlpSpec, MlpWeights, tensors_in
from ..ops.packing import key_of, span
from . import cpp


def attention(
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    residual_scale: Tensor | None = None,
) -> list[Tensor | None] | None:
    """Gradients of `cpp.attention` by x and the weights, where `needed`; None where one by residual_scale is."""
    if residual_scale is not None and needed[-1]:
        return None

    def build(held: Any) -> Any:
        return _C.attention_gradients(
            cpp.isa(), cpp.kernel_dtype(cpp.readable(x.detach())), cpp.attention_form(held, spec)
        )

    op = cpp.packed_op("attention gradients", key_of(cpp.isa(), w, spec), w, lambda weights: None, build)
    return _residual(op, grad_output, needed, x, hw, w, residual_scale)


def mlp(
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    residual_scale: Tensor | None = None,
) -> list[Tensor | None] | None:
    """Gradients of `cpp.mlp` by x and the weights, where `needed`; None where one by residual_scale is."""
    if residual_scale is not None and needed[-1]:
        return None

    def build(held: Any) -> Any:
        return _C.mlp_gradients(cpp.isa(), cpp.kernel_dtype(cpp.readable(x.detach())), cpp.mlp_form(held, spec))

    op = cpp.packed_op("mlp gradients", key_of(cpp.isa(), w, spec), w, lambda weights: None, build)
    return _residual(op, grad_output, needed, x, hw, w, residual_scale)


def _residual(
    op: Any,
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: Any,
    residual_scale: Tensor | None,
) -> list[Tensor | None]:
    given = x.detach()
    x, grad = cpp.readable(given).contiguous(), cpp.readable(grad_output).contiguous()
    weights = tensors_in(w)
    wanted = iter(needed[1 : 1 + len(weights)])
    found = [
        torch.empty(tensor.shape, dtype=torch.float32) if tensor is not None and next(wanted) else None
        for part in w
        for tensor in ((None, None) if part is None else part[:2])
    ]
    grad_x = torch.empty_like(x) if needed[0] else None
    scale = None if residual_scale is None else cpp.readable(residual_scale.detach()).to(x.dtype).contiguous()
    op.run(
        span(x),
        x.shape[0],
        *hw,
        None if scale is None else span(scale),
        span(grad),
        None if grad_x is None else span(grad_x),
        [None if gradient is None else span(gradient) for gradient in found],
    )
    present = [tensor for part in w if part is not None for tensor in part[:2]]
    given_to = [
        gradient
        for part, pair in zip(w, zip(found[::2], found[1::2], strict=True), strict=True)
        if part is not None
        for tensor, gradient in zip(part[:2], pair, strict=True)
        if tensor is not None
    ]
    result = [None if grad_x is None else grad_x.to(given.dtype)]
    for tensor, gradient in zip((t for t in present if t is not None), given_to, strict=True):
        result.append(None if gradient is None else like(gradient, tensor))
    if residual_scale is not None:
        result.append(None)
    return result


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the dtype and with the strides of its parameter."""
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(gradient)
