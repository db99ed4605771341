"""The ops of the contract, forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...ops import (
    HW,
    PRODUCTS,
    AttentionSpec,
    AttentionWeights,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    Support,
    check_attention,
    check_head,
    check_layer_norm,
    check_mlp,
    check_patch_embed,
    result_dtype,
)
from ...ops.packing import key_of, span
from .instruction_sets import isa
from .weights import (
    Kernels,
    attention_form,
    kernels_for,
    linear_form,
    mlp_form,
    norm_form,
    pack_op,
    readable,
    span_if,
    stored_scale,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUPPORT = Support(
    "cpp",
    _DTYPES,
    lambda device: None if device == "cpu" else f"it runs on CPU tensors, got {device}",
    PRODUCTS,
)


def patch_embed(
    image: Tensor, w: PatchEmbedWeights, stride: int, products: torch.dtype | None = None
) -> tuple[Tensor, HW]:
    """LayerNorm(conv(image)); see `reference.patch_embed`."""
    hw = check_patch_embed(image, w, stride, products, plain=True, packed=True)
    _require_runs("patch_embed", image)
    chosen, given = isa(), image.detach()
    kernels, image, channels_last = laid_out(given, products)
    channels, in_channels, kernel, _ = w.proj.weight.shape

    def check(weights: Any) -> None:
        check_patch_embed(given, weights, stride, products, plain=True)

    def build(held: Any) -> Any:
        sizes = (in_channels, channels, kernel, stride)
        return _C.PatchEmbed(chosen, kernels.dtype, linear_form(held.proj), norm_form(held.norm), sizes, channels_last)

    kind = "patch_embed channels_last" if channels_last else "patch_embed"
    op = pack_op(kind, kernels, key_of(chosen, w, stride), w, build, check)
    out = torch.empty((image.shape[0], hw[0] * hw[1], channels), dtype=image.dtype, device=image.device)
    op.run(span(image), (image.shape[0], *image.shape[2:]), image.stride(), span(out))
    return out.to(result_dtype("patch_embed", "cpu", given.dtype, products)), hw


def laid_out(image: Tensor, products: torch.dtype | None) -> tuple[Kernels, Tensor, bool]:
    """Which kernels embed it, the image as they read it, and whether channels are last in it."""
    # the result has the products' dtype, so the image may have it
    kernels = kernels_for(torch.bfloat16 if products is torch.bfloat16 else image.dtype, products)
    image = readable(image).to(kernels.storage)
    strides = image.stride()
    channels_last = strides[1] == 1 and strides[3] == image.shape[1]
    if not channels_last and strides[3] != 1:
        image = image.clone(memory_format=torch.contiguous_format)  # contiguous(): any stride will do for a side of 1
    return kernels, image, channels_last


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
    chosen, given, kernels = isa(), x.detach(), kernels_for(x.dtype, products)
    x = readable(given).contiguous()

    def check(weights: Any) -> None:
        check_attention(given, hw, weights, spec, None, products, plain=True)

    def build(held: Any) -> Any:
        return _C.attention(chosen, kernels.dtype, attention_form(held, spec))

    op = pack_op("attention", kernels, key_of(chosen, w, spec), w, build, check)
    return _run_residual(op, x, hw, stored_scale(residual_scale, kernels)).to(given.dtype)


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
    chosen, given, kernels = isa(), x.detach(), kernels_for(x.dtype, products)
    x = readable(given).contiguous()

    def check(weights: Any) -> None:
        check_mlp(given, hw, weights, spec, None, products, plain=True)

    def build(held: Any) -> Any:
        return _C.mlp(chosen, kernels.dtype, mlp_form(held, spec))

    op = pack_op("mlp", kernels, key_of(chosen, w, spec), w, build, check)
    return _run_residual(op, x, hw, stored_scale(residual_scale, kernels)).to(given.dtype)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """LayerNorm over the last dimension; see `reference.layer_norm`."""
    check_layer_norm(x, w, plain=True, packed=True)
    _require_runs("layer_norm", x)
    chosen, given, kernels = isa(), x.detach(), kernels_for(x.dtype, None)
    x = readable(given).contiguous()

    def check(weights: Any) -> None:
        check_layer_norm(given, weights, plain=True)

    def build(held: Norm) -> Any:
        return _C.LayerNorm(chosen, kernels.dtype, norm_form(held), x.shape[-1])

    op = pack_op("layer_norm", kernels, key_of(chosen, w), w, build, check)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    op.run(span(x), x.numel() // x.shape[-1], span(out))
    return out.to(given.dtype)


def head(x: Tensor, w: Linear | None, products: torch.dtype | None = None) -> Tensor:
    """Mean over tokens, then the classifier; see `reference.head`."""
    check_head(x, w, products, plain=True, packed=True)
    _require_runs("head", x)
    chosen, given, kernels = isa(), x.detach(), kernels_for(x.dtype, products)
    x = readable(given).contiguous()
    batch, tokens, channels = x.shape
    classes = channels if w is None else w.weight.shape[0]

    def check(weights: Any) -> None:
        check_head(given, weights, products, plain=True)

    def build(held: Linear) -> Any:
        return _C.Head(chosen, kernels.dtype, linear_form(held), channels, classes)

    if w is None:
        op = _C.Head(chosen, kernels.dtype, None, channels, classes)
    else:
        op = pack_op("head", kernels, key_of(chosen, w), w, build, check)
    out = torch.empty((batch, classes), dtype=x.dtype, device=x.device)
    op.run(span(x), batch, tokens, span(out))
    return out.to(result_dtype("head", "cpu", given.dtype, products, classifies=w is not None))


def _run_residual(op: Any, x: Tensor, hw: HW, scale: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    op.run(span(x), x.shape[0], *hw, span_if(scale), span(out))
    return out


def _require_runs(op: str, x: Tensor, spec: AttentionSpec | MlpSpec | None = None) -> None:
    if x.device.type != "cpu" or x.dtype not in _DTYPES or (spec is not None and spec.drops):
        SUPPORT.require(op, x.device.type, x.dtype, spec)  # the same questions, slower, and the error
