"""The two halves of a block as the contract's ops: from a peer's modules to weight tuples, at every call.

A half holds modules, not tensors, and reads their parameters when it runs: what an optimizer, `load_state_dict`, `.to`
or `torch.func.functional_call` put there is what counts. Weights that the contract wants in another form (keys and
values together, a 1x1 convolution as a matrix) are derived: without gradients once, until they change, else at each
call, so that gradients reach the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import HW, AttentionSpec, AttentionWeights, Linear, MlpSpec, MlpWeights, Norm
from ..ops.packing import Alias, packed
from .guard import NOW, When


class Part(NamedTuple):
    """A module's weight and bias, with the shapes that they had when the block was read (None: no bias)."""

    module: nn.Module
    shapes: tuple[Any, ...]
    names: tuple[str, str] = ("weight", "bias")

    @classmethod
    def of(cls, module: nn.Module, names: tuple[str, str] = ("weight", "bias")) -> Part:
        tensors = [module._parameters[name] for name in names]
        return cls(module, tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors), names)

    def tensors(self, when: When = NOW) -> tuple[Any, Any]:
        """(weight, bias or None)."""
        return when.parameter(self.module, self.names[0]), when.parameter(self.module, self.names[1])


class Derived:
    """A form of parameters that is kept until they change."""

    def __init__(self, build: Callable[..., tuple]) -> None:
        self.build = build

    def __call__(self, fresh: bool, *tensors: Any) -> tuple:
        if fresh or self.build is not join:  # the others are views, known by the memory that they look at
            return self.build(*tensors)

        def build(alias: Alias) -> tuple:
            return self.build(*(None if tensor is None else alias(tensor) for tensor in tensors))

        return packed("derived", self.build.__name__, tensors, build)


def join(key: Tensor, value: Tensor, key_bias: Tensor | None, value_bias: Tensor | None) -> tuple:
    """Weight and bias of one linear for keys, then values."""
    bias = None if key_bias is None or value_bias is None else torch.cat((key_bias, value_bias))
    return torch.cat((key, value)), bias


def split(weight: Tensor, bias: Tensor | None) -> tuple:
    """Weights and biases of the queries' linear and the keys' and values', of an nn.MultiheadAttention's one."""
    channels = weight.shape[1]
    halves = (None, None) if bias is None else (bias[:channels], bias[channels:])
    return weight[:channels], weight[channels:], *halves


def matrices(first: Tensor, second: Tensor) -> tuple:
    """The kernels of two 1x1 convolutions as matrices."""
    return first.flatten(1), second.flatten(1)


class AttentionHalf:
    """x + residual_scale * attention(norm(x)) on a peer's modules."""

    name = "attention"

    def __init__(
        self,
        norm: Part,
        qkv: tuple[Part, ...],
        proj: Part,
        sr: Part | None,
        sr_norm: Part | None,
        heads: tuple[nn.Module, str],
        scale: tuple[nn.Module, str] | None,
        linear: bool,
    ) -> None:
        self.norm, self.qkv, self.proj, self.sr, self.sr_norm = norm, qkv, proj, sr, sr_norm
        self.heads, self.scale, self.linear = heads, scale, linear
        self.parts = tuple(part for part in (norm, *qkv, proj, sr, sr_norm) if part is not None)
        # in the order of `qkv`: one part is an nn.MultiheadAttention's, two are q and kv, three are q, k and v
        self.derived = {1: Derived(split), 2: None, 3: Derived(join)}[len(qkv)]

    def weights(self, fresh: bool, when: When = NOW) -> AttentionWeights:
        tensors = [part.tensors(when) for part in self.qkv]
        if len(tensors) == 1 and self.derived:
            q, kv, q_bias, kv_bias = self.derived(fresh, *tensors[0])
        elif len(tensors) == 3 and self.derived:
            (q, q_bias), (k, k_bias), (v, v_bias) = tensors
            kv, kv_bias = self.derived(fresh, k, v, k_bias, v_bias)
        else:
            (q, q_bias), (kv, kv_bias) = tensors
        return AttentionWeights(
            norm_of(self.norm, when),
            Linear(q, q_bias),
            Linear(kv, kv_bias),
            None if self.sr is None else linear_of(self.sr, when),
            None if self.sr_norm is None else norm_of(self.sr_norm, when),
            linear_of(self.proj, when),
        )

    def spec(self, when: When = NOW) -> AttentionSpec:
        heads = when.setting(*self.heads)
        scale = when.setting(*self.scale) if self.scale else (self.norm.shapes[0][0] // heads) ** -0.5
        return AttentionSpec(heads, scale, self.linear)

    def run(
        self,
        ops: Any,
        x: Tensor,
        hw: HW,
        residual_scale: Tensor | None,
        fresh: bool,
        products: torch.dtype | None = None,
    ) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return ops.attention(x, hw, self.weights(fresh), self.spec(), residual_scale, products)

    def min_size(self) -> int:
        """The fewest rows and columns of a map that it takes."""
        return 1 if self.sr is None or self.linear else self.sr.shapes[0][2]


class MlpHalf:
    """x + residual_scale * mlp(norm(x)) on a peer's modules."""

    name = "mlp"

    def __init__(self, norm: Part, fc1: Part, dwconv: Part, fc2: Part, relu: bool) -> None:
        self.norm, self.fc1, self.dwconv, self.fc2, self.relu = norm, fc1, dwconv, fc2, relu
        self.parts = (norm, fc1, dwconv, fc2)
        self.derived = Derived(matrices) if len(fc1.shapes[0]) == 4 else None

    def weights(self, fresh: bool, when: When = NOW) -> MlpWeights:
        (fc1, fc1_bias), (fc2, fc2_bias) = self.fc1.tensors(when), self.fc2.tensors(when)
        if self.derived:
            fc1, fc2 = self.derived(fresh, fc1, fc2)
        norm, dwconv = norm_of(self.norm, when), linear_of(self.dwconv, when)
        return MlpWeights(norm, Linear(fc1, fc1_bias), dwconv, Linear(fc2, fc2_bias))

    def spec(self, when: When = NOW) -> MlpSpec:
        return MlpSpec(self.relu)

    def run(
        self,
        ops: Any,
        x: Tensor,
        hw: HW,
        residual_scale: Tensor | None,
        fresh: bool,
        products: torch.dtype | None = None,
    ) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        return ops.mlp(x, hw, self.weights(fresh), self.spec(), residual_scale, products)

    def min_size(self) -> int:
        """The fewest rows and columns of a map that it takes."""
        return 1


def norm_of(part: Part, when: When = NOW) -> Norm:
    """A LayerNorm's weights as the contract has them."""
    return Norm(*part.tensors(when), when.setting(part.module, "eps"))


def linear_of(part: Part, when: When = NOW) -> Linear:
    """A linear's or convolution's weights as the contract has them."""
    return Linear(*part.tensors(when))
