"""How a peer's transformer block is laid out: the names of its parts and the way its forward is called.

A layout names attributes and signatures, never a class or a package, so that a vendored copy of a peer's file is
recognised as well. What the parts compute is checked by `read` and `verify`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn


class Refusal(Exception):
    """A block, or half of one, cannot be accelerated; the message says why."""


@dataclass(frozen=True)
class AttentionNames:
    """Dotted paths of an attention half, from its block. `sr`, `sr_norm`, `pool` and `act` may lead nowhere."""

    norm: str
    module: str  # what takes the normalised tokens
    proj: str
    sr: str
    sr_norm: str
    heads: str  # an int attribute
    q: str = ""
    kv: tuple[str, ...] = ()  # one linear, or one for keys and one for values
    in_proj: str = ""  # instead of q and kv: an nn.MultiheadAttention
    scale: str = ""  # a float attribute; without one it is head_dim ** -0.5
    pool: str = ""
    act: str = ""
    rates: tuple[str, ...] = ()  # float attributes that are dropout rates, beside all nn.Dropout modules
    after: tuple[str, ...] = ()  # modules between `module` and the stochastic depth
    drop_path: tuple[str, ...] = ("drop_path",)  # the first that is there
    residual_inside: bool = False  # `module` takes the block's input as `identity` and adds to it

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.norm, self.q, *self.kv, self.in_proj, self.proj)))


@dataclass(frozen=True)
class MlpNames:
    """Dotted paths of an MLP half, from its block. `relu` may lead nowhere."""

    norm: str
    module: str
    fc1: str
    dwconv: tuple[str, ...]  # the first that is there
    act: str
    fc2: str
    relu: str = ""
    drop_path: tuple[str, ...] = ("drop_path",)
    residual_inside: bool = False
    after: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return (self.norm, self.fc1, self.fc2)


# Required parameters of a block's forward, by how it takes tokens (B, N, C) and the size of their map.
SIZES = "x, H, W"
PAIR = "x, (H, W)"
MAP = "x of shape (B, C, H, W)"
ARITIES = {SIZES: 3, PAIR: 2, MAP: 1}


@dataclass(frozen=True)
class BlockLayout:
    """One peer's block: `call` is one of SIZES, PAIR and MAP; `ignored` are keyword arguments that change nothing."""

    name: str
    call: str
    attention: AttentionNames
    mlp: MlpNames
    ignored: tuple[str, ...] = ()

    def fits(self, block: nn.Module, forward: Any) -> int:
        """How many halves `block` has all parts of, with both norms and a forward that is called in this way."""
        norms = all(at(block, path) is not None for path in (self.attention.norm, self.mlp.norm))
        if not norms or len(required_parameters(forward)) != ARITIES[self.call]:
            return 0
        attention = all(at(block, path) is not None for path in self.attention.required)
        mlp = all(at(block, path) is not None for path in self.mlp.required)
        return attention + (mlp and first(block, self.mlp.dwconv) is not None)


def required_parameters(forward: Any) -> tuple[str, ...]:
    """The names of an unbound forward's positional parameters without a default, but for self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.kind in kinds][1:]
    return tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)


def takes_tokens_only(forward: Any) -> bool:
    """Does an unbound forward take tokens alone, without the size of their map?"""
    parameters = inspect.signature(forward).parameters.values()
    return len(required_parameters(forward)) == 1 and all(
        p.kind != inspect.Parameter.VAR_POSITIONAL for p in parameters
    )


def at(block: nn.Module, path: str) -> Any:
    """What `path` leads to from `block`; None where it leads nowhere, and for an nn.Identity."""
    value: Any = block if path else None
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return None if type(value) is nn.Identity else value


def first(block: nn.Module, paths: tuple[str, ...]) -> Any:
    """What is found at the first of `paths` that leads anywhere; None where none does."""
    return next((found for path in paths if (found := at(block, path)) is not None), None)
