"""The architecture of a PVT v2 as plain data: its fields, their checks, and the published variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Stride of each overlap patch embed: 4 in the first stage, 2 in the others (paper, section 3.2).
FIRST_STRIDE = 4
NEXT_STRIDE = 2
NEXT_PATCH_SIZE = 3

# Epsilon that the official repository hard-codes for the patch-embed and spatial-reduction norms.
INNER_NORM_EPS = 1e-5
# Epsilon of block and stage norms in every published variant; the class default is nn.LayerNorm's 1e-5.
VARIANT_NORM_EPS = 1e-6

# Side of the pooled map in linear spatial-reduction attention.
LINEAR_POOL_SIZE = 7


@dataclass(frozen=True)
class PVTConfig:
    """What fixes the shape of a PVT v2; see `PVT_V2` for the meaning of each field.

    Raises ValueError or TypeError, naming the field, its condition and the value got.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 7
    in_channels: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    qkv_bias: bool = False
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    depths: tuple[int, ...] = (3, 4, 6, 3)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    num_stages: int = 4
    linear: bool = False

    def __post_init__(self) -> None:
        _require_int("num_stages", self.num_stages, minimum=1)
        _require_int("in_channels", self.in_channels, minimum=1)
        _require_int("num_classes", self.num_classes, minimum=0)
        _require_int("patch_size", self.patch_size, minimum=FIRST_STRIDE + 1)
        if not isinstance(self.img_size, int):
            object.__setattr__(self, "img_size", self.img_hw)
        for field in ("embed_dims", "num_heads", "depths", "sr_ratios", "mlp_ratios"):
            object.__setattr__(self, field, self._per_stage(field))
        for field in ("embed_dims", "num_heads", "depths", "sr_ratios"):
            for value in getattr(self, field):
                _require_int(field, value, minimum=1)
        for stage in range(self.num_stages):
            dim, heads = self.embed_dims[stage], self.num_heads[stage]
            if dim % heads:
                raise ValueError(
                    f"PVT_V2: embed_dims[{stage}] must be divisible by num_heads[{stage}], got {dim} and {heads}"
                )
            if self.mlp_ratios[stage] <= 0 or int(dim * self.mlp_ratios[stage]) < 1:
                raise ValueError(
                    f"PVT_V2: mlp_ratios[{stage}] must give at least one hidden channel, "
                    f"got {self.mlp_ratios[stage]} for {dim} channels"
                )
        for field in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            rate = getattr(self, field)
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"PVT_V2: {field} must lie in [0, 1), got {rate}")
        self.map_sizes(*self.img_hw)

    def _per_stage(self, field: str) -> tuple:
        value = getattr(self, field)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"PVT_V2: {field} must be a sequence with one entry per stage, got {value!r}")
        if len(value) != self.num_stages:
            raise ValueError(
                f"PVT_V2: {field} must have num_stages = {self.num_stages} entries, got {len(value)}: {tuple(value)}"
            )
        return tuple(value)

    @property
    def img_hw(self) -> tuple[int, int]:
        """`img_size` as (height, width)."""
        size = self.img_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        _require_int("img_size", height, minimum=1)
        _require_int("img_size", width, minimum=1)
        return height, width

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Width of each stage's MLP hidden map."""
        return tuple(int(dim * ratio) for dim, ratio in zip(self.embed_dims, self.mlp_ratios, strict=True))

    def patch(self, stage: int) -> tuple[int, int]:
        """(kernel size, stride) of a stage's patch embed; its padding is kernel // 2."""
        return (self.patch_size, FIRST_STRIDE) if stage == 0 else (NEXT_PATCH_SIZE, NEXT_STRIDE)

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(H, W) of every stage's map for an image of that size; ValueError if the image does not survive.

        A stage with sr_ratio R > 1 convolves its map with an R x R kernel, so the map must be at least R x R
        (linear attention pools instead and takes any map).
        """
        sizes = []
        hw = (height, width)
        for stage in range(self.num_stages):
            kernel, stride = self.patch(stage)
            hw = (conv_size(hw[0], kernel, stride), conv_size(hw[1], kernel, stride))
            need = 1 if self.linear else self.sr_ratios[stage]
            if min(hw) < need:
                raise ValueError(
                    f"PVT_V2: image must be large enough for stage {stage + 1}, whose map must be at least "
                    f"{need}x{need}; got a {height}x{width} image, which gives {hw[0]}x{hw[1]}"
                )
            sizes.append(hw)
        return sizes


def conv_size(size: int, kernel: int, stride: int) -> int:
    """Output length of a convolution with padding kernel // 2."""
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def _require_int(field: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"PVT_V2: {field} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"PVT_V2: {field} must be at least {minimum}, got {value}")


def _variant(depths, embed_dims=(64, 128, 320, 512), mlp_ratios=(8, 8, 4, 4), linear=False) -> dict[str, Any]:
    return {
        "embed_dims": embed_dims,
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": mlp_ratios,
        "qkv_bias": True,
        "depths": depths,
        "sr_ratios": (8, 4, 2, 1),
        "linear": linear,
    }


# The published variants (Wang et al., "PVT v2", Table 1 and the released checkpoints). b5 has mlp_ratios
# (4, 4, 4, 4), as every published b5 checkpoint has.
VARIANTS: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": _variant((2, 2, 2, 2), embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": _variant((2, 2, 2, 2)),
    "pvt_v2_b2": _variant((3, 4, 6, 3)),
    "pvt_v2_b2_li": _variant((3, 4, 6, 3), linear=True),
    "pvt_v2_b3": _variant((3, 4, 18, 3)),
    "pvt_v2_b4": _variant((3, 8, 27, 3)),
    "pvt_v2_b5": _variant((3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
