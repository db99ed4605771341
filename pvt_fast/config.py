"""The architecture of a PVT v2 as plain data: its fields, their checks, and the published variants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .arguments import MAX_INT, entries, flag, integer, number, rate, shown

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

# Far above any model that was ever trained: a typing error is reported before it takes all memory.
MAX_STAGES = 32
MAX_DEPTH = 1_000
MAX_PARAMETERS = 2**34


@dataclass(frozen=True)
class PVTConfig:
    """What fixes the shape of a PVT v2; see `PVT_V2` for the meaning of each field.

    All is kept in plain Python: ints, floats, bools, tuples.
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
        for field, check in _FIELDS.items():
            object.__setattr__(self, field, check(f"PVT_V2: {field}", getattr(self, field)))
        for field, check in _PER_STAGE.items():
            values = tuple(check(f"PVT_V2: {field}", value) for value in self._per_stage(field))
            object.__setattr__(self, field, values)
        for stage in range(self.num_stages):
            self._check_widths(stage)
        self.map_sizes(*self.img_hw)
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                "PVT_V2: embed_dims, depths, mlp_ratios, sr_ratios, patch_size, in_channels and num_classes must make "
                f"at most {MAX_PARAMETERS} parameters, got {self.num_parameters}"
            )

    def _per_stage(self, field: str) -> Sequence[Any]:
        where = f"PVT_V2: {field}"
        values = entries(where, getattr(self, field), "a sequence with one entry per stage")
        if len(values) != self.num_stages:
            raise ValueError(
                f"{where} must have num_stages = {self.num_stages} entries, got {len(values)}: {shown(values)}"
            )
        return values

    def _check_widths(self, stage: int) -> None:
        dim, heads, ratio = self.embed_dims[stage], self.num_heads[stage], self.mlp_ratios[stage]
        if dim % heads:
            raise ValueError(
                f"PVT_V2: embed_dims[{stage}] must be divisible by num_heads[{stage}], got {dim} and {heads}"
            )
        if int(dim * ratio) < 1:
            raise ValueError(
                f"PVT_V2: mlp_ratios[{stage}] must give at least one hidden channel, got {ratio} for {dim} channels"
            )

    @property
    def img_hw(self) -> tuple[int, int]:
        """`img_size` as (height, width)."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters of the model."""
        total, channels = 0, self.in_channels
        for stage, dim in enumerate(self.embed_dims):
            kernel, _ = self.patch(stage)
            total += dim * channels * kernel**2 + 3 * dim  # the patch embed: convolution, bias, norm
            total += self.depths[stage] * self._block_parameters(stage) + 2 * dim
            channels = dim
        return total + self.num_classes * (channels + 1)

    def _block_parameters(self, stage: int) -> int:
        dim, hidden, ratio = self.embed_dims[stage], self.hidden_dims[stage], self.sr_ratios[stage]
        attention = 4 * dim**2 + dim + (3 * dim if self.qkv_bias else 0)
        if self.linear or ratio > 1:
            attention += dim**2 * (1 if self.linear else ratio**2) + 3 * dim
        mlp = 2 * dim * hidden + dim + 11 * hidden  # fc1 and fc2; of the hidden map fc1's bias, 3x3 and bias
        return attention + mlp + 4 * dim

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


def _image_size(where: str, value: Any) -> int | tuple[int, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return integer(where, value, 1)
    sides = entries(where, value, "an int or (height, width)")
    if len(sides) != 2:
        raise ValueError(f"{where} must be an int or (height, width), got {shown(value)}")
    height, width = (integer(where, side, 1) for side in sides)
    return height, width


def _optional_number(where: str, value: Any) -> float | None:
    return None if value is None else number(where, value)


# What each field may be; `_PER_STAGE` has what each entry of a sequence may be.
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "num_stages": partial(integer, minimum=1, maximum=MAX_STAGES),
    "in_channels": partial(integer, minimum=1),
    "num_classes": partial(integer, minimum=0),
    "patch_size": partial(integer, minimum=FIRST_STRIDE + 1),
    "img_size": _image_size,
    "qkv_bias": flag,
    "qk_scale": _optional_number,
    "drop_rate": rate,
    "attn_drop_rate": rate,
    "drop_path_rate": rate,
    "linear": flag,
}
_PER_STAGE: dict[str, Callable[[str, Any], Any]] = {
    "embed_dims": partial(integer, minimum=1),
    "num_heads": partial(integer, minimum=1),
    "depths": partial(integer, minimum=1, maximum=MAX_DEPTH),
    "sr_ratios": partial(integer, minimum=1),
    "mlp_ratios": partial(number, maximum=MAX_INT),
}


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
