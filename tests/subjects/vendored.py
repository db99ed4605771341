"""Small models in the styles of files that projects copy: what pvt_fast.accelerate_ finds by structure, not by class.

Written for the tests from the published structure: names of attributes, order of steps and signatures are those of the
peers, the code is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIMS, HEADS, RATIOS = (16, 24), (1, 3), (4, 1)


class DropPath(nn.Module):
    """Stochastic depth per sample."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)


def as_map(x: Tensor, H: int, W: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], H, W)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(as_tokens(x)), x.shape[2], x.shape[3]


class Backbone(nn.Module):
    """Two stages of two blocks `make(dim, heads, sr_ratio)`, then logits; `run(block, x, H, W)` calls a block."""

    def __init__(self, make: Callable[[int, int, int], nn.Module], run: Callable) -> None:
        super().__init__()
        self.run = run
        for i, (dim, heads, ratio) in enumerate(zip(DIMS, HEADS, RATIOS, strict=True), 1):
            kernel, stride = (7, 4) if i == 1 else (3, 2)
            setattr(self, f"patch_embed{i}", PatchEmbed(3 if i == 1 else DIMS[i - 2], dim, kernel, stride))
            setattr(self, f"block{i}", nn.ModuleList(make(dim, heads, ratio) for _ in range(2)))
            setattr(self, f"norm{i}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(DIMS[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, len(DIMS) + 1):
            x, H, W = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = self.run(block, x, H, W)
            x = as_map(getattr(self, f"norm{i}")(x), H, W)
        return self.head(x.mean((2, 3)))


# -- official: forward(x, H, W) ----------------------------------------------------------------------------------------


class DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return as_tokens(self.dwconv(as_map(x, H, W)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0, linear: bool = False, act: Callable = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.linear = linear
        if linear:
            self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = self.fc1(x)
        if self.linear:
            x = self.relu(x)
        x = self.drop(self.act(self.dwconv(x, H, W)))
        return self.drop(self.fc2(x))


class Attention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int, linear: bool = False, drops: tuple = (0.0, 0.0)
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.linear, self.sr_ratio = linear, sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attn_drop, self.proj_drop = nn.Dropout(drops[0]), nn.Dropout(drops[1])
        self.proj = nn.Linear(dim, dim)
        if linear:
            self.pool = nn.AdaptiveAvgPool2d(7)
            self.sr = nn.Conv2d(dim, dim, 1)
            self.act = nn.GELU()
        elif sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
        if linear or sr_ratio > 1:
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape
        shape = (B, -1, self.num_heads, C // self.num_heads)
        q, y = self.q(x).reshape(shape), x
        if self.linear:
            y = self.act(self.norm(as_tokens(self.sr(self.pool(as_map(x, H, W))))))
        elif self.sr_ratio > 1:
            y = self.norm(as_tokens(self.sr(as_map(x, H, W))))
        k, v = (half.reshape(shape) for half in self.kv(y).chunk(2, dim=-1))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * self.scale
        z = torch.einsum("bhnm,bmhd->bnhd", self.attn_drop(scores.softmax(-1)), v)
        return self.proj_drop(self.proj(z.reshape(B, N, C)))


class Block(nn.Module):
    """`options` are those of `Attention` and `Mlp`, and their classes."""

    def __init__(
        self, dim, heads, sr_ratio, linear=False, drop=0.0, drop_path=0.0, attention=Attention, mlp=Mlp
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads, sr_ratio, linear, (drop, drop))
        self.mlp = mlp(dim, 2 * dim, drop, linear)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


def run_sizes(block: nn.Module, x: Tensor, H: int, W: int) -> Tensor:
    return block(x, H, W)


def official(**options) -> Backbone:
    return Backbone(lambda *sizes: Block(*sizes, **options), run_sizes)


# -- the same names on maps: forward(x), x (B, C, H, W) ----------------------------------------------------------------


class MapBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        return as_map(super().forward(as_tokens(x), H, W), H, W)


def run_map(block: nn.Module, x: Tensor, H: int, W: int) -> Tensor:
    return as_tokens(block(as_map(x, H, W)))


def on_maps(**options) -> Backbone:
    return Backbone(lambda *sizes: MapBlock(*sizes, **options), run_map)


# -- mmdet, mmseg: forward(x, hw_shape), nn.MultiheadAttention, convolutions as linears --------------------------------


class Conv2d(nn.Conv2d):
    """Such projects wrap torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class EfficientAttention(nn.Module):
    def __init__(self, dim: int, heads: int, sr_ratio: int, bias: bool, drop: float, drop_path: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, drop, bias=bias)
        self.proj_drop = nn.Dropout(drop)
        self.dropout_layer = DropPath(drop_path)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:
        y = self.norm(as_tokens(self.sr(as_map(x, *hw_shape)))) if self.sr_ratio > 1 else x
        z = self.attn(x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1))[0].transpose(0, 1)
        return (x if identity is None else identity) + self.dropout_layer(self.proj_drop(z))


class MixFFN(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.activate, dropout = nn.GELU(), nn.Dropout(drop)
        dwconv = Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        fc1, fc2 = Conv2d(dim, hidden, 1), Conv2d(hidden, dim, 1)
        self.layers = nn.Sequential(fc1, dwconv, self.activate, dropout, fc2, dropout)
        self.dropout_layer = DropPath(drop_path)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:
        z = as_tokens(self.layers(as_map(x, *hw_shape)))
        return (x if identity is None else identity) + self.dropout_layer(z)


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, sr_ratio, bias=True, drop=0.0, drop_path=0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = EfficientAttention(dim, heads, sr_ratio, bias, drop, drop_path)
        self.ffn = MixFFN(dim, 2 * dim, drop, drop_path)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = self.attn(self.norm1(x), hw_shape, identity=x)
        return self.ffn(self.norm2(x), hw_shape, identity=x)


def run_pair(block: nn.Module, x: Tensor, H: int, W: int) -> Tensor:
    return block(x, (H, W))


def openmmlab(**options) -> Backbone:
    return Backbone(lambda *sizes: EncoderLayer(*sizes, **options), run_pair)


# -- the official names with another meaning ---------------------------------------------------------------------------


class ResidualMlp(Mlp):
    """A residual around the convolution, as in Shunted Transformer."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.act(x + self.dwconv(x, H, W)))


class CosineAttention(Attention):
    """Queries of unit length."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(F.normalize(x, dim=-1), H, W)
