"""Gradients of the ops on C++ kernels: `Backward`s of the contract.

Weights are packed anew for the backward, beside what the forward keeps: the kernels recompute what that did not keep,
and want matrices both ways. Of weights that get gradients nothing is kept: a step is about to change them. Gradients of
weights come as floats; each goes to its parameter's dtype and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...ops import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Backward,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    tensors_in,
)
from ...ops.packing import key_of, span
from .forward import laid_out
from .instruction_sets import isa
from .weights import (
    Kernels,
    attention_form,
    build_op,
    kernels_for,
    linear_form,
    mlp_form,
    norm_form,
    pack_op,
    readable,
    span_if,
    stored_scale,
)

Gradients = list[Tensor | None]


def patch_embed(
    grad_output: Tensor,
    needed: Sequence[bool],
    image: Tensor,
    w: PatchEmbedWeights,
    stride: int,
    products: torch.dtype | None,
) -> Gradients:
    """Of the image and the weights."""
    if not grad_output.numel():
        return _zeros(needed, image, w)
    chosen, given = isa(), image.detach()
    kernels, image, channels_last = laid_out(given, products)
    channels, in_channels, kernel, _ = w.proj.weight.shape

    def build(held: Any) -> Any:
        sizes = (in_channels, channels, kernel, stride)
        proj, norm = linear_form(held.proj), norm_form(held.norm)
        return _C.PatchEmbedGradients(chosen, kernels.dtype, proj, norm, sizes, channels_last)

    kind = "patch_embed gradients channels_last" if channels_last else "patch_embed gradients"
    op = _op(kind, kernels, key_of(chosen, w, stride), w, needed, build)
    grad = _grad(grad_output, kernels)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad_image = torch.empty(image.shape, dtype=image.dtype, memory_format=memory_format) if needed[0] else None
    found = _Found(w, needed[1:])
    size = (image.shape[0], *image.shape[2:])
    op.run(span(image), size, image.stride(), span(grad), span_if(grad_image), found.spans())
    return [None if grad_image is None else grad_image.to(given.dtype), *found.gradients()]


def attention(
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    residual_scale: Tensor | None,
    products: torch.dtype | None,
) -> Gradients:
    """Of x and the weights."""

    def build(chosen: str, dtype: _C.DType, held: Any) -> Any:
        return _C.attention_gradients(chosen, dtype, attention_form(held, spec))

    return _residual("attention gradients", build, grad_output, needed, x, hw, w, spec, residual_scale, products)


def mlp(
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    residual_scale: Tensor | None,
    products: torch.dtype | None,
) -> Gradients:
    """Of x and the weights."""

    def build(chosen: str, dtype: _C.DType, held: Any) -> Any:
        return _C.mlp_gradients(chosen, dtype, mlp_form(held, spec))

    return _residual("mlp gradients", build, grad_output, needed, x, hw, w, spec, residual_scale, products)


def _residual(
    kind: str,
    build: Callable[[str, _C.DType, Any], Any],
    grad_output: Tensor,
    needed: Sequence[bool],
    x: Tensor,
    hw: HW,
    w: AttentionWeights | MlpWeights,
    spec: AttentionSpec | MlpSpec,
    residual_scale: Tensor | None,
    products: torch.dtype | None,
) -> Gradients:
    if not x.numel():
        return _zeros(needed, x, w, residual_scale)
    chosen, kernels = isa(), kernels_for(x.dtype, products)
    key = key_of(chosen, w, spec)
    op = _op(kind, kernels, key, w, needed, lambda held: build(chosen, kernels.dtype, held))
    scale = stored_scale(residual_scale, kernels)
    gradients = _run(op, kernels, x, (x.shape[0], *hw, span_if(scale)), grad_output, needed, w)
    return gradients if residual_scale is None else [*gradients, None]


def _op(kind: str, kernels: Kernels, key: tuple, w: Any, needed: Sequence[bool], build: Callable[[Any], Any]) -> Any:
    """The packed op; needed: of the activations first."""
    return build_op(kernels, w, build) if any(needed[1:]) else pack_op(kind, kernels, key, w, build)


def _run(
    op: Any,
    kernels: Kernels,
    given: Tensor,
    sizes: tuple,
    grad_output: Tensor,
    needed: Sequence[bool],
    parts: Sequence[Norm | Linear | None],
) -> Gradients:
    """Of dense activations `given` and of the weights; sizes: what the op's `run` takes between the two."""
    x, grad = readable(given.detach()).contiguous(), _grad(grad_output, kernels)
    grad_x = torch.empty_like(x) if needed[0] else None
    found = _Found(parts, needed[1:])
    op.run(span(x), *sizes, span(grad), span_if(grad_x), found.spans())
    return [None if grad_x is None else grad_x.to(given.dtype), *found.gradients()]


def _grad(grad_output: Tensor, kernels: Kernels) -> Tensor:
    """As the kernels read it."""
    return readable(grad_output).to(kernels.storage).contiguous()


def layer_norm(grad_output: Tensor, needed: Sequence[bool], x: Tensor, w: Norm) -> Gradients:
    """Of x and the weights."""
    if not x.numel():
        return _zeros(needed, x, w)
    chosen, kernels, channels = isa(), kernels_for(x.dtype, None), x.shape[-1]

    def build(held: Norm) -> Any:
        return _C.LayerNormGradients(chosen, kernels.dtype, norm_form(held), channels)

    op = _op("layer_norm gradients", kernels, key_of(chosen, w), w, needed, build)
    return _run(op, kernels, x, (x.numel() // channels,), grad_output, needed, (w,))


def head(
    grad_output: Tensor, needed: Sequence[bool], x: Tensor, w: Linear | None, products: torch.dtype | None
) -> Gradients:
    """Of x and the weights."""
    if not x.numel():
        return _zeros(needed, x, w)
    chosen, kernels = isa(), kernels_for(x.dtype, products)
    batch, tokens, channels = x.shape
    classes = channels if w is None else w.weight.shape[0]

    def build(held: Linear | None) -> Any:
        form = None if held is None else linear_form(held)
        return _C.HeadGradients(chosen, kernels.dtype, form, channels, classes)

    op = build(None) if w is None else _op("head gradients", kernels, key_of(chosen, w), w, needed, build)
    return _run(op, kernels, x, (batch, tokens), grad_output, needed, (w,))


class _Found:
    """Memory for the gradients of weights, a weight and a bias for each norm and linear, where they are needed."""

    def __init__(self, parts: Sequence[Norm | Linear | None], needed: Sequence[bool]) -> None:
        self._tensors = [tensor for part in parts for tensor in ((None, None) if part is None else part[:2])]
        wanted: Iterator[bool] = iter(needed)
        self._floats = [
            torch.empty(tensor.shape, dtype=torch.float32) if tensor is not None and next(wanted) else None
            for tensor in self._tensors
        ]

    def spans(self) -> list[tuple[int, int] | None]:
        return [span_if(gradient) for gradient in self._floats]

    def gradients(self) -> Iterator[Tensor | None]:
        """Of the weights that there are, as those are."""
        for tensor, gradient in zip(self._tensors, self._floats, strict=True):
            if tensor is not None:
                yield None if gradient is None else _like(gradient, tensor)


def _zeros(needed: Sequence[bool], *arguments: Any) -> Gradients:
    """Of an empty batch."""
    tensors = tensors_in(arguments)
    return [torch.zeros_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)]


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(gradient)


BACKWARD: dict[str, Backward] = {
    "patch_embed": patch_embed,
    "attention": attention,
    "mlp": mlp,
    "layer_norm": layer_norm,
    "head": head,
}
