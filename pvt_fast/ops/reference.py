"""Backend "reference": every op of the contract in plain torch. It is the specification.

Any device and dtype, float64 included; gradients through autograd. See `ops` for the arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend.dispatch import Facts
from ..config import LINEAR_POOL_SIZE
from . import (
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
    to_map,
    to_tokens,
)


def unsupported(facts: Facts) -> str | None:
    """None: plain torch runs whatever torch runs."""
    return None


def overlap_patch_embed(image: Tensor, w: PatchEmbedWeights, stride: int) -> tuple[Tensor, HW]:
    """LayerNorm(conv(image)): image (B, Cin, H, W) -> tokens (B, H' * W', C) and (H', W')."""
    hw = check_patch_embed(image, w, stride)
    y = _conv2d(image, w.proj, stride=stride, padding=w.proj.weight.shape[2] // 2)
    return layer_norm(to_tokens(y), w.norm), hw


def sr_attention(
    x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None = None
) -> Tensor:
    """x + proj(softmax(q k^T * scale) v), where y = LayerNorm(x), q = y Wq and k, v come from the reduced map of y."""
    check_attention(x, hw, w, spec, residual_scale)
    batch, tokens, channels = x.shape
    heads = spec.num_heads
    y = layer_norm(x, w.norm)

    reduced = y
    if w.sr is not None and w.sr_norm is not None:
        y_map = to_map(y, hw)
        if spec.linear:
            y_map = pool(y_map)
        # stride R without padding: rows and columns past the last full R x R patch reach no key
        reduced = to_tokens(_conv2d(y_map, w.sr, stride=w.sr.weight.shape[2]))
        reduced = layer_norm(reduced, w.sr_norm)
        if spec.linear:
            reduced = F.gelu(reduced)

    q = F.linear(y, w.q.weight, w.q.bias).reshape(batch, tokens, heads, channels // heads)
    kv = F.linear(reduced, w.kv.weight, w.kv.bias).reshape(batch, reduced.shape[1], 2, heads, channels // heads)
    q, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4)  # (B, heads, N or M, head_dim)
    scores = (q @ k.transpose(-2, -1)) * spec.scale
    attention = F.dropout(scores.softmax(dim=-1), spec.attn_drop)
    z = (attention @ v).transpose(1, 2).reshape(batch, tokens, channels)
    z = F.dropout(F.linear(z, w.proj.weight, w.proj.bias), spec.proj_drop)
    return _add_residual(x, z, residual_scale)


def dwconv_mlp(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None = None) -> Tensor:
    """x + fc2(gelu(dwconv3x3(h))), h = fc1(LayerNorm(x)), or relu of it. The convolution pads h with zeros."""
    check_mlp(x, hw, w, spec, residual_scale)
    h = F.linear(layer_norm(x, w.norm), w.fc1.weight, w.fc1.bias)
    if spec.relu:
        h = F.relu(h)
    h = to_tokens(_conv2d(to_map(h, hw), w.dwconv, padding=1, groups=h.shape[2]))
    h = F.dropout(F.gelu(h), spec.drop)
    z = F.dropout(F.linear(h, w.fc2.weight, w.fc2.bias), spec.drop)
    return _add_residual(x, z, residual_scale)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    check_layer_norm(x, w)
    return F.layer_norm(x, w.weight.shape, w.weight, w.bias, w.eps)


def head(x: Tensor, w: Linear | None) -> Tensor:
    """Mean over the tokens (B, N, C) -> (B, C), then the classifier (B, num_classes) unless `w` is None."""
    check_head(x, w)
    mean = x.mean(dim=1)
    return mean if w is None else F.linear(mean, w.weight, w.bias)


def _conv2d(image: Tensor, conv: Linear, **options: int) -> Tensor:
    return F.conv2d(convolvable(image), _kernel(conv), conv.bias, **options)


def convolvable(image: Tensor) -> Tensor:
    """The same map in a form that compilers can convolve."""
    # inductor (torch 2.13) fails on a convolution of a channels-last view whose sizes are symbols
    return image.contiguous() if _sizes_are_symbols(image) else image


def _sizes_are_symbols(image: Tensor) -> bool:
    """Whether a compiler traces this for any height and width.

    It does not tell; but of a number it knows the rest after a division, of a symbol not (unless that is declared to
    be a multiple of every divisor tried here).
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # not for every process: it loads sympy

    return not all(
        any(statically_known_true(size % divisor == rest) for rest in range(divisor))
        for size in image.shape[2:]
        for divisor in (2, 3, 5, 7, 11)
    )


def _kernel(conv: Linear) -> Tensor:
    """The convolution kernel, seen through views that give its gradient the parameter's own strides.

    A channels-last map makes the gradient of a (C, 1, 3, 3) kernel one of strides (9, 1, 3, 1), not (9, 9, 3, 1):
    the same memory, but DistributedDataParallel compares strides, warns and copies.
    """
    return conv.weight.flatten(1).unflatten(1, conv.weight.shape[1:])


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is at work; asked only where it may be, as torch's answer imports the exporter."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export()


def pool(y_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 7, 7): means of adaptive bins, which overlap where 7 does not divide the size."""
    if not exporting_to_onnx() and not _sizes_are_symbols(y_map):
        return F.adaptive_avg_pool2d(y_map, LINEAR_POOL_SIZE)
    # ONNX has fixed windows only, and inductor fixes the windows of the first size: two products are the same sums
    rows, columns = (_averages(size, y_map) for size in y_map.shape[2:])
    return rows @ y_map @ columns.T


def _averages(size: int, like: Tensor) -> Tensor:
    """(7, size): row i averages the places [floor(i * size / 7), ceil((i + 1) * size / 7))."""
    bins = torch.arange(LINEAR_POOL_SIZE, device=like.device).unsqueeze(1)
    places = torch.arange(size, device=like.device)
    starts, ends = bins * size // LINEAR_POOL_SIZE, ((bins + 1) * size + LINEAR_POOL_SIZE - 1) // LINEAR_POOL_SIZE
    return ((places >= starts) & (places < ends)).to(like.dtype) / (ends - starts).to(like.dtype)


def _add_residual(x: Tensor, z: Tensor, residual_scale: Tensor | None) -> Tensor:
    return x + (z if residual_scale is None else residual_scale.view(-1, 1, 1).to(z.dtype) * z)
