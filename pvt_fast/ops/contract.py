"""The contract between the model and its backends: weight tuples, op signatures and argument checks.

A backend is a module with the functions below under exactly these names and parameters, plus
`unsupported(facts) -> str | None` (see `dispatch`). Activations are channels-last tokens `x (B, N, C)` of a map
`hw = (H, W)`, `N = H * W`, row-major. Every function returns new tensors and changes no argument.

    overlap_patch_embed(image, w, stride) -> (x, hw)
    sr_attention(x, hw, w, spec, residual_scale=None) -> x'
    dwconv_mlp(x, hw, w, spec, residual_scale=None) -> x'
    layer_norm(x, w) -> x'
    head(x, w) -> logits

A backend may know whole models besides: see `program` for the one of the C++ kernels.

The grain is coarse on purpose: the gain of a fused backend is that the hidden map of the MLP (4-8 C wide), the
queries and the attention scores never reach memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import conv_size

if TYPE_CHECKING:
    from ..dispatch import Facts

HW = tuple[int, int]


class Norm(NamedTuple):
    """LayerNorm over the last dimension: `weight (C,)`, `bias (C,)`, `eps`."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A matrix or convolution kernel with its bias: `weight (Cout, Cin[, k, k])`, `bias (Cout,)` or None."""

    weight: Tensor
    bias: Tensor | None


class PatchEmbedWeights(NamedTuple):
    """`proj`: weight (C, Cin, k, k), its padding is k // 2; `norm`: over C."""

    proj: Linear
    norm: Norm


class AttentionWeights(NamedTuple):
    """`norm` over C, `q` (C, C), `kv` (2C, C) with the C rows of K first, `proj` (C, C).

    `sr` (C, C, R, R) and `sr_norm` over C reduce the map that gives K and V: both None where R is 1; in the linear
    form R is 1 and both are present.
    """

    norm: Norm
    q: Linear
    kv: Linear
    sr: Linear | None
    sr_norm: Norm | None
    proj: Linear


class MlpWeights(NamedTuple):
    """`norm` over C, `fc1` (hidden, C), `dwconv` (hidden, 1, 3, 3), `fc2` (C, hidden)."""

    norm: Norm
    fc1: Linear
    dwconv: Linear
    fc2: Linear


class AttentionSpec(NamedTuple):
    """`scale` multiplies the scores; `linear` pools the map to 7x7 and applies GELU before kv.

    The dropout rates are those in force now: 0 outside training.
    """

    num_heads: int
    scale: float
    linear: bool
    attn_drop: float = 0.0
    proj_drop: float = 0.0


class MlpSpec(NamedTuple):
    """`relu` puts a ReLU between fc1 and the depthwise convolution (the linear variants)."""

    relu: bool
    drop: float = 0.0


class Backend(Protocol):
    """What a backend module offers; `reference` is the specification of each function."""

    __name__: str

    @staticmethod
    def unsupported(facts: Facts) -> str | None: ...
    @staticmethod
    def overlap_patch_embed(image: Tensor, w: PatchEmbedWeights, stride: int) -> tuple[Tensor, HW]: ...
    @staticmethod
    def sr_attention(
        x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None = None
    ) -> Tensor: ...
    @staticmethod
    def dwconv_mlp(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None = None) -> Tensor: ...
    @staticmethod
    def layer_norm(x: Tensor, w: Norm) -> Tensor: ...
    @staticmethod
    def head(x: Tensor, w: Linear | None) -> Tensor: ...


def to_map(x: Tensor, hw: HW) -> Tensor:
    """Tokens (B, N, C) seen as a map (B, C, H, W) with channels-last strides; no copy."""
    return x.unflatten(1, hw).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """A map (B, C, H, W) seen as tokens (B, N, C); no copy when its strides are channels-last."""
    return image.flatten(2).transpose(1, 2)


def check_patch_embed(image: Tensor, w: PatchEmbedWeights, stride: int) -> HW:
    """Check the arguments of `overlap_patch_embed`; return the size of the output map."""
    op = "overlap_patch_embed"
    weight = w.proj.weight
    if image.dim() != 4:
        raise ValueError(f"{op}: image must have shape (B, Cin, H, W), got {tuple(image.shape)}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: w.proj.weight must have shape (C, Cin, k, k), got {tuple(weight.shape)}")
    if image.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: image must have {weight.shape[1]} channels, got {image.shape[1]}")
    channels, _, kernel, _ = weight.shape
    _check_like(op, "image", image, weight)
    _check_linear(op, "proj", w.proj, weight.shape, image)
    _check_norm(op, "norm", w.norm, channels, image)
    hw = (conv_size(image.shape[2], kernel, stride), conv_size(image.shape[3], kernel, stride))
    if min(hw) < 1:
        raise ValueError(
            f"{op}: image must give at least one token with a {kernel}x{kernel} kernel of stride {stride}, "
            f"got {image.shape[2]}x{image.shape[3]}"
        )
    return hw


def check_attention(x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None) -> None:
    """Check the arguments of `sr_attention`."""
    op = "sr_attention"
    _check_tokens(op, x, hw, w.q.weight, residual_scale)
    channels = x.shape[2]
    if spec.num_heads < 1 or channels % spec.num_heads:
        raise ValueError(f"{op}: channels must be divisible by num_heads = {spec.num_heads}, got {channels}")
    _check_norm(op, "norm", w.norm, channels, x)
    _check_linear(op, "q", w.q, (channels, channels), x)
    _check_linear(op, "kv", w.kv, (2 * channels, channels), x)
    _check_linear(op, "proj", w.proj, (channels, channels), x)
    if spec.linear and w.sr is None:
        raise ValueError(f"{op}: w.sr must be a 1x1 convolution in the linear form, got None")
    if (w.sr is None) != (w.sr_norm is None):
        raise ValueError(f"{op}: w.sr and w.sr_norm must be given together, got one of them")
    if w.sr is not None and w.sr_norm is not None:
        if w.sr.weight.dim() != 4:
            raise ValueError(f"{op}: w.sr.weight must have shape (C, C, R, R), got {tuple(w.sr.weight.shape)}")
        ratio = 1 if spec.linear else w.sr.weight.shape[2]
        _check_linear(op, "sr", w.sr, (channels, channels, ratio, ratio), x)
        _check_norm(op, "sr_norm", w.sr_norm, channels, x)
        if min(hw) < ratio:
            raise ValueError(f"{op}: hw must be at least sr_ratio = {ratio} each way, got {hw}")


def check_mlp(x: Tensor, hw: HW, w: MlpWeights, residual_scale: Tensor | None) -> None:
    """Check the arguments of `dwconv_mlp`."""
    op = "dwconv_mlp"
    _check_tokens(op, x, hw, w.fc1.weight, residual_scale)
    channels, hidden = x.shape[2], w.fc1.weight.shape[0]
    _check_norm(op, "norm", w.norm, channels, x)
    _check_linear(op, "fc1", w.fc1, (hidden, channels), x)
    _check_linear(op, "dwconv", w.dwconv, (hidden, 1, 3, 3), x)
    _check_linear(op, "fc2", w.fc2, (channels, hidden), x)


def check_layer_norm(x: Tensor, w: Norm) -> None:
    """Check the arguments of `layer_norm`."""
    if x.dim() < 1:
        raise ValueError("layer_norm: x must have a last dimension of channels, got a scalar")
    _check_norm("layer_norm", "", w, x.shape[-1], x)


def check_head(x: Tensor, w: Linear | None) -> None:
    """Check the arguments of `head`."""
    if x.dim() != 3:
        raise ValueError(f"head: x must have shape (B, N, C), got {tuple(x.shape)}")
    if w is not None:
        if w.weight.dim() != 2:
            raise ValueError(f"head: w.weight must have shape (classes, C), got {tuple(w.weight.shape)}")
        _check_linear("head", "", w, (w.weight.shape[0], x.shape[2]), x)


def _check_tokens(op: str, x: Tensor, hw: HW, weight: Tensor, residual_scale: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape (B, N, C), got {tuple(x.shape)}")
    _check_like(op, "x", x, weight)
    if x.shape[1] != hw[0] * hw[1]:
        raise ValueError(f"{op}: x must have H * W = {hw[0]} * {hw[1]} tokens, got {x.shape[1]}")
    if weight.dim() != 2 or x.shape[2] != weight.shape[1]:
        raise ValueError(f"{op}: x must have {weight.shape[-1]} channels, got {x.shape[2]}")
    if residual_scale is not None and residual_scale.shape != (x.shape[0],):
        raise ValueError(
            f"{op}: residual_scale must have shape (B,) = ({x.shape[0]},), got {tuple(residual_scale.shape)}"
        )


def _check_norm(op: str, name: str, norm: Norm, channels: int, x: Tensor) -> None:
    _check_weight(op, name, "weight", norm.weight, (channels,), x)
    _check_weight(op, name, "bias", norm.bias, (channels,), x)


def _check_linear(op: str, name: str, linear: Linear, shape: tuple[int, ...], x: Tensor) -> None:
    _check_weight(op, name, "weight", linear.weight, shape, x)
    if linear.bias is not None:
        _check_weight(op, name, "bias", linear.bias, shape[:1], x)


def _check_weight(op: str, owner: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A weight must have the contract's shape, and dtype and device of the activations."""
    where = ".".join(filter(None, ("w", owner, name)))
    if tensor.shape != shape:
        raise ValueError(f"{op}: {where} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    _check_like(op, where, tensor, x, "x's")


def _check_like(op: str, name: str, tensor: Tensor, other: Tensor, whose: str = "the weights'") -> None:
    if tensor.dtype != other.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise TypeError(f"{op}: {name} must have {whose} dtype {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} must be on {whose} device {other.device}, got {tensor.device}")
