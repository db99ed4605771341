"""The layers of PVT v2: their parameters and their order. The arithmetic is the backend's (see `ops`).

Module and parameter names are those of the official repository, so that its checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import INNER_NORM_EPS
from .ops import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
)
from .prepack import PackCache


def norm_weights(norm: nn.LayerNorm, cache: PackCache | None = None) -> Norm:
    return Norm(_tensor(norm, "weight"), _tensor(norm, "bias"), norm.eps, cache)


def linear_weights(layer: nn.Linear | nn.Conv2d, cache: PackCache | None = None) -> Linear:
    return Linear(_tensor(layer, "weight"), _tensor(layer, "bias"), cache)


def _tensor(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)`, at a tenth of its price where it is a plain parameter: a forward asks for hundreds."""
    tensor = module._parameters.get(name)
    return getattr(module, name) if tensor is None else tensor


class OverlapPatchEmbed(nn.Module):
    """Strided convolution whose kernel is larger than its stride, then LayerNorm: a map becomes tokens."""

    def __init__(self, in_channels: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=INNER_NORM_EPS)
        self._cache = PackCache()

    def forward(self, image: Tensor, ops: Backend) -> tuple[Tensor, HW]:
        """image (B, Cin, H, W) -> tokens (B, H' * W', dim) and (H', W')."""
        weights = PatchEmbedWeights(linear_weights(self.proj), norm_weights(self.norm), self._cache)
        return ops.overlap_patch_embed(image, weights, self.proj.stride[0])


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a spatially reduced map: R x R convolution, or 7x7 pooling."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        linear: bool,
        qkv_bias: bool,
        scale: float,
        rates: tuple[float, float],
    ) -> None:
        super().__init__()
        self.spec = AttentionSpec(num_heads, scale, linear)
        self.drop_rates = rates  # (attention probabilities, projection)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if linear or sr_ratio > 1:
            kernel = 1 if linear else sr_ratio
            self.sr: nn.Conv2d | None = nn.Conv2d(dim, dim, kernel, stride=kernel)
            self.norm: nn.LayerNorm | None = nn.LayerNorm(dim, eps=INNER_NORM_EPS)
        else:
            self.sr = None
            self.norm = None
        self._cache = PackCache()

    def forward(self, x: Tensor, hw: HW, norm: nn.LayerNorm, ops: Backend, residual_scale: Tensor | None) -> Tensor:
        """x + residual_scale * attention(norm(x)), x (B, N, dim)."""
        weights = AttentionWeights(
            norm_weights(norm),
            linear_weights(self.q),
            linear_weights(self.kv),
            None if self.sr is None else linear_weights(self.sr),
            None if self.norm is None else norm_weights(self.norm),
            linear_weights(self.proj),
            self._cache,
        )
        spec = self.spec
        if self.training and any(self.drop_rates):
            spec = spec._replace(attn_drop=self.drop_rates[0], proj_drop=self.drop_rates[1])
        return ops.sr_attention(x, hw, weights, spec, residual_scale)


class DWConv(nn.Module):
    """Holds the depthwise 3x3 convolution under the official key `dwconv.dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class DWConvMLP(nn.Module):
    """fc1, [ReLU], depthwise 3x3, GELU, fc2."""

    def __init__(self, dim: int, hidden: int, linear: bool, drop_rate: float) -> None:
        super().__init__()
        self.spec = MlpSpec(relu=linear)
        self.drop_rate = drop_rate
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self._cache = PackCache()

    def forward(self, x: Tensor, hw: HW, norm: nn.LayerNorm, ops: Backend, residual_scale: Tensor | None) -> Tensor:
        """x + residual_scale * mlp(norm(x)), x (B, N, dim)."""
        weights = MlpWeights(
            norm_weights(norm),
            linear_weights(self.fc1),
            linear_weights(self.dwconv.dwconv),
            linear_weights(self.fc2),
            self._cache,
        )
        spec = self.spec
        if self.training and self.drop_rate:
            spec = spec._replace(drop=self.drop_rate)
        return ops.dwconv_mlp(x, hw, weights, spec, residual_scale)


class Block(nn.Module):
    """Attention, then MLP; each adds to its input, in training with stochastic depth."""

    def __init__(
        self,
        attn: SpatialReductionAttention,
        mlp: DWConvMLP,
        norms: tuple[nn.LayerNorm, nn.LayerNorm],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = attn
        self.mlp = mlp
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, hw: HW, ops: Backend) -> Tensor:
        """x (B, N, dim) -> (B, N, dim)."""
        x = self.attn(x, hw, self.norm1, ops, self._residual_scale(x))
        return self.mlp(x, hw, self.norm2, ops, self._residual_scale(x))

    def _residual_scale(self, x: Tensor) -> Tensor | None:
        """Per sample 0 with probability drop_path_rate, else 1 / (1 - drop_path_rate); None when not dropping."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        keep = 1.0 - self.drop_path_rate
        return torch.empty(x.shape[0], dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)
