"""The contract between the model and its backends: weight tuples and op signatures.

What must hold of arguments is in `checks`.

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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ..backend.dispatch import Facts

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


def map_tensors(arguments: Any, transform: Callable[[Tensor], Any]) -> Any:
    """The same nested tuples with `transform(tensor)` for every tensor in them."""
    if isinstance(arguments, Tensor):
        return transform(arguments)
    if isinstance(arguments, tuple):
        items = [map_tensors(item, transform) for item in arguments]
        return type(arguments)(*items) if hasattr(arguments, "_fields") else tuple(items)
    return arguments


def tensors_in(arguments: Any) -> list[Tensor]:
    """All tensors in nested tuples, in order."""
    found: list[Tensor] = []
    map_tensors(arguments, found.append)
    return found


def to_map(x: Tensor, hw: HW) -> Tensor:
    """Tokens (B, N, C) seen as a map (B, C, H, W) with channels-last strides; no copy."""
    return x.unflatten(1, hw).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """A map (B, C, H, W) seen as tokens (B, N, C); no copy when its strides are channels-last."""
    return image.flatten(2).transpose(1, 2)
