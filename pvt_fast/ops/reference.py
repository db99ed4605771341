"""Backend "reference": every op of the contract in plain torch. It is the specification.

Any device and dtype, float64 included; gradients through autograd. See `ops` for the arguments. `products` are those of
torch.autocast, whatever of it is on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Backend,
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
    to_map,
    to_tokens,
)
from .traceable import adaptive_pool, conv2d


def patch_embed(
    image: Tensor, w: PatchEmbedWeights, stride: int, products: torch.dtype | None = None
) -> tuple[Tensor, HW]:
    """LayerNorm(conv(image)): image (B, Cin, H, W) -> tokens (B, H' * W', C) and (H', W')."""
    hw = check_patch_embed(image, w, stride, products)
    with _autocast(image, products):
        y = conv2d(image, w.proj, stride=stride, padding=w.proj.weight.shape[2] // 2)
        return _norm(to_tokens(y), w.norm), hw


def attention(
    x: Tensor,
    hw: HW,
    w: AttentionWeights,
    spec: AttentionSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x + proj(softmax(q k^T * scale) v), where y = LayerNorm(x), q = y Wq and k, v come from the reduced map of y."""
    check_attention(x, hw, w, spec, residual_scale, products)
    with _autocast(x, products):
        return _attention(x, hw, w, spec, residual_scale)


def _attention(x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None) -> Tensor:
    batch, tokens, channels = x.shape
    heads = spec.num_heads
    y = _norm(x, w.norm)

    reduced = y
    if w.sr is not None and w.sr_norm is not None:
        y_map = to_map(y, hw)
        if spec.linear:
            y_map = adaptive_pool(y_map)
        # stride R without padding: rows and columns past the last full R x R patch reach no key
        reduced = to_tokens(conv2d(y_map, w.sr, stride=w.sr.weight.shape[2]))
        reduced = _norm(reduced, w.sr_norm)
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


def mlp(
    x: Tensor,
    hw: HW,
    w: MlpWeights,
    spec: MlpSpec,
    residual_scale: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    """x + fc2(gelu(dwconv3x3(h))), h = fc1(LayerNorm(x)), or relu of it. The convolution pads h with zeros."""
    check_mlp(x, hw, w, spec, residual_scale, products)
    with _autocast(x, products):
        return _mlp(x, hw, w, spec, residual_scale)


def _mlp(x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None) -> Tensor:
    h = F.linear(_norm(x, w.norm), w.fc1.weight, w.fc1.bias)
    if spec.relu:
        h = F.relu(h)
    h = to_tokens(conv2d(to_map(h, hw), w.dwconv, padding=1, groups=h.shape[2]))
    h = F.dropout(F.gelu(h), spec.drop)
    z = F.dropout(F.linear(h, w.fc2.weight, w.fc2.bias), spec.drop)
    return _add_residual(x, z, residual_scale)


def layer_norm(x: Tensor, w: Norm) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    check_layer_norm(x, w)
    return _norm(x, w)


def _norm(x: Tensor, w: Norm) -> Tensor:
    return F.layer_norm(x, w.weight.shape, w.weight, w.bias, w.eps)


def head(x: Tensor, w: Linear | None, products: torch.dtype | None = None) -> Tensor:
    """Mean over the tokens (B, N, C) -> (B, C), then the classifier (B, num_classes) unless `w` is None."""
    check_head(x, w, products)
    with _autocast(x, products):
        mean = x.mean(dim=1)
        return mean if w is None else F.linear(mean, w.weight, w.bias)


def _autocast(x: Tensor, products: torch.dtype | None) -> AbstractContextManager:
    # without its cache: that may be another's to clear, and no op uses a weight twice
    return nullcontext() if products is None else torch.autocast(x.device.type, products, cache_enabled=False)


def _add_residual(x: Tensor, z: Tensor, residual_scale: Tensor | None) -> Tensor:
    return x + (z if residual_scale is None else residual_scale.view(-1, 1, 1).to(z.dtype) * z)


BACKEND = Backend(Support("reference"), patch_embed, attention, mlp, layer_norm, head)
