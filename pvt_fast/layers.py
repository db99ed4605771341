"""The layers of PVT v2 as plain torch modules: every forward calls its children in the official order.

Module and parameter names are those of the official repository, so that its checkpoints load as they are. Where nothing
disturbs a layer's modules, the ops of the contract stand in for them (`accelerate.fused`): first thing in a forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .accelerate.block_names import BlockLayout, Refusal
from .accelerate.fused import Fused, FusedBlock, FusedEmbed, FusedHead, FusedNorm, Settings, StandIn
from .accelerate.guard import Kinds
from .accelerate.peers import PVT_FAST
from .accelerate.read import read_attention, read_embed, read_head, read_mlp, read_norm, roots
from .config import INNER_NORM_EPS, LINEAR_POOL_SIZE
from .ops import to_tokens
from .ops.traceable import adaptive_pool, convolvable


class OverlapPatchEmbed(nn.Module):
    """Strided convolution whose kernel is larger than its stride, then LayerNorm: a map becomes tokens."""

    def __init__(
        self, in_channels: int, dim: int, kernel_size: int, stride: int, settings: Settings | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=INNER_NORM_EPS)
        self._fused = StandIn(_read_embed, settings or Settings())

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        """image (B, Cin, H, W) -> tokens (B, H' * W', dim), H', W'."""
        fused = self._fused.run(self, image)
        if fused is not None:
            return fused
        x = self.proj(convolvable(image))
        height, width = x.shape[2], x.shape[3]
        return self.norm(to_tokens(x)), height, width

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._fused = StandIn(_read_embed, self._fused.settings)
        self._fused.current(self)


class DropPath(nn.Module):
    """Stochastic depth: in training each sample becomes 0 with probability `drop_prob`, else x / (1 - drop_prob)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        scale = torch.empty(x.shape[0], dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)
        return x * scale.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Pool(nn.AdaptiveAvgPool2d):
    """Adaptive average pooling to 7x7, in a form that exporters take at any size."""

    def __init__(self) -> None:
        super().__init__(LINEAR_POOL_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_pool(x)


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
        """rates: dropout of the attention probabilities, and after the projection."""
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(rates[0])
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(rates[1])
        self.pool: nn.Module | None = Pool() if linear else None
        self.act: nn.Module | None = nn.GELU() if linear else None
        if linear or sr_ratio > 1:
            kernel = 1 if linear else sr_ratio
            self.sr: nn.Module | None = nn.Conv2d(dim, dim, kernel, stride=kernel)
            self.norm: nn.Module | None = nn.LayerNorm(dim, eps=INNER_NORM_EPS)
        else:
            self.sr = None
            self.norm = None

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, H * W, dim) -> (B, H * W, dim)."""
        batch, tokens, channels = x.shape[0], x.shape[1], x.shape[2]
        heads = self.num_heads
        q = self.q(x).reshape(batch, tokens, heads, channels // heads).transpose(1, 2)
        reduced = x if self.sr is None or self.norm is None else self._reduce(x, height, width)
        kv = self.kv(reduced).reshape(batch, -1, 2, heads, channels // heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]  # (B, heads, M, head_dim)
        attention = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        z = (attention @ v).transpose(1, 2).reshape(batch, tokens, channels)
        return self.proj_drop(self.proj(z))

    def _reduce(self, x: Tensor, height: int, width: int) -> Tensor:
        """The reduced map's tokens (B, M, dim) that keys and values are made of."""
        y = map_of(x, height, width)
        if self.pool is not None:
            y = self.pool(y)
        y = self.norm(to_tokens(self.sr(convolvable(y))))  # type: ignore[misc]
        return y if self.act is None else self.act(y)


class DWConv(nn.Module):
    """The depthwise 3x3 convolution, on tokens, under the official key `dwconv.dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, H * W, dim) -> (B, H * W, dim)."""
        return to_tokens(self.dwconv(convolvable(map_of(x, height, width))))


class DWConvMLP(nn.Module):
    """fc1, [ReLU], depthwise 3x3, GELU, fc2."""

    def __init__(self, dim: int, hidden: int, linear: bool, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.relu: nn.Module | None = nn.ReLU() if linear else None
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, H * W, dim) -> (B, H * W, dim)."""
        x = self.fc1(x)
        if self.relu is not None:
            x = self.relu(x)
        x = self.drop(self.act(self.dwconv(x, height, width)))
        return self.drop(self.fc2(x))


class Block(nn.Module):
    """Attention, then MLP; each adds to its input, in training with stochastic depth."""

    def __init__(
        self,
        attn: SpatialReductionAttention,
        mlp: DWConvMLP,
        norms: tuple[nn.LayerNorm, nn.LayerNorm],
        drop_path_rate: float,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn = attn
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.mlp = mlp
        self._fused = StandIn(_read_block, settings or Settings())

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, H * W, dim) -> (B, H * W, dim)."""
        fused = self._fused.run(self, x, height, width)
        if fused is not None:
            return fused
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x), height, width))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._fused = StandIn(_read_block, self._fused.settings)
        self._fused.current(self)


def stage_norm(name: str, settings: Settings) -> StandIn:
    """For a model's norm `name`, called with the model."""
    return StandIn(_ReadNorm(name), settings, (name,))


def classifier(name: str, settings: Settings) -> StandIn:
    """For a model's head `name` behind the mean over tokens, called with the model."""
    return StandIn(_ReadHead(name), settings, (name,))


def map_of(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, C) seen as a map (B, C, H, W): `ops.to_map` in operators that all exporters know."""
    return x.reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)


# -- reading: what the ops may stand in for ---------------------------------------------------------------------------

# Classes whose forwards the ops know, as they were when this package was imported. Others, and subclasses with methods
# of their own, are called.
_KNOWN = Kinds(
    (
        nn.Linear,
        nn.Conv2d,
        nn.LayerNorm,
        nn.GELU,
        nn.ReLU,
        nn.Dropout,
        nn.Identity,
        Pool,
        DropPath,
        SpatialReductionAttention,
        DWConv,
        DWConvMLP,
    )
)


# What these call in any case.
_CALLED = {
    SpatialReductionAttention: ("q", "kv", "attn_drop", "proj", "proj_drop"),
    DWConv: ("dwconv",),
    DWConvMLP: ("fc1", "dwconv", "act", "fc2", "drop"),
}


def _require_known(owner: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(root := owner._modules.get(name, vars(owner).get(name)), nn.Module):
            raise Refusal(f"its {name} is a {type(root).__name__}")
        for path, module in root.named_modules(prefix=name):
            if not _KNOWN.include(module):
                raise Refusal(f"its {path} is a {_KNOWN.describe(module)}")
            for child in _CALLED.get(type(module), ()):
                if module._modules.get(child) is None:
                    raise Refusal(f"its {path} has no {child}")


def _read_block(block: nn.Module, settings: Settings) -> Fused:
    layout: BlockLayout = PVT_FAST
    halves, refusals = {}, {}
    for name, reader in (("attention", read_attention), ("mlp", read_mlp)):
        names = getattr(layout, name)
        try:
            _require_known(block, (*roots(block, names), "drop_path"))
            halves[name] = reader(block, names)
        except Refusal as refusal:
            refusals[name] = str(refusal)
    if not halves:
        raise Refusal("; ".join(f"{name}: {why}" for name, why in refusals.items()))
    fused = FusedBlock(layout, settings, block, Block.forward, halves)
    fused.exports, fused.refusals = True, refusals
    return fused


def _read_embed(embed: nn.Module, settings: Settings) -> Fused:
    _require_known(embed, ("proj", "norm"))
    return FusedEmbed(settings, embed, *read_embed(embed, "proj", "norm"))


class _ReadNorm:
    """Reads one stage norm of a model; an object that can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, model: nn.Module, settings: Settings) -> Fused:
        _require_known(model, (self.name,))
        return FusedNorm(settings, model, self.name, read_norm(model, self.name))


class _ReadHead(_ReadNorm):
    """Reads the head of a model."""

    def __call__(self, model: nn.Module, settings: Settings) -> Fused:
        _require_known(model, (self.name,))
        return FusedHead(settings, model, self.name, read_head(model, self.name))
