"""Modules' forwards on the contract's ops, and all that must hold at a call for those to stand in.

`Fused` is what a piece of a model needs for that: its parameters, its guard, its choice of backend. `FusedBlock` is a
block of any layout, ours or another's; `FusedEmbed`, `FusedNorm` and `FusedHead` are the pieces of our own model around
its blocks. Each returns None where the module's own forward must run, and says once in the log why.

`StandIn` is what a module of ours owns: its fused form, read again when the module was changed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import dispatch, registered
from ..ops import HW, PLAIN, Facts, PatchEmbedWeights, norms_give_float32, to_map, to_tokens, unfit_dtypes
from ..ops.traceable import constant_while_traced, exporting_to_onnx
from . import read
from .block_names import (
    MAP,
    PAIR,
    AttentionNames,
    BlockLayout,
    MlpNames,
    Refusal,
    at,
    first,
    required_parameters,
    takes_tokens_only,
)
from .guard import NOW, Guard, When, ambient, edges, products_now
from .halves import AttentionHalf, MlpHalf, Part, linear_of, norm_of
from .peers import PVT_FAST

logger = logging.getLogger("pvt_fast")


class Settings:
    """What the fused pieces of one model share: the backend that it asks for."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend


class Fused:
    """Modules below an owner that the ops may stand in for."""

    def __init__(
        self,
        settings: Settings,
        owner: nn.Module,
        roots: Sequence[str],
        parts: Sequence[Part],
        dropouts: Sequence[tuple[nn.Module, str]] = (),
        watched: bool = False,
    ) -> None:
        """watched: may the owner's forward read attributes of its own, or call methods?"""
        self.settings = settings
        self.what = type(owner).__name__
        self.forward = type(owner).forward  # the owner's own
        # (module, name, shape) of every weight and bias
        self.parameters = [
            (part.module, name, shape) for part in parts for name, shape in zip(part.names, part.shapes, strict=True)
        ]
        self.dropouts = dropouts  # (module, name of its attribute)
        children = edges((root, owner._modules[root]) for root in roots)
        self.guard = Guard(children, owner if watched else None)

    def choose(self, owner: nn.Module, x: Any) -> str | None:
        """Name of the backend whose ops run on x; None where the modules' own forwards must."""
        obstacle = self.obstacle(owner, x)
        if obstacle is None:
            backend = self.settings.backend
            if torch.compiler.is_compiling():
                backend = registered.requested(backend)
            name = _choose(x.device.type, x.dtype, backend, products_now(x))
            if name is not None:
                return name
            obstacle = "no backend is faster than plain torch here"
        if not torch.compiler.is_compiling():
            log(self.what, obstacle)
        return None

    def ops(self, owner: nn.Module, x: Any) -> Any:
        """The ops that run on x; None where the modules' own forwards must."""
        name = self.choose(owner, x)
        return None if name is None else ops_of(name, self.needs_gradients(x))

    def obstacle(self, owner: nn.Module, x: Any) -> str | None:
        """Why the ops cannot stand in on x."""
        if torch.compiler.is_exporting():
            if not self.exports or exporting_to_onnx():
                return "it is being exported"
        elif type(x) not in PLAIN:
            return f"its input is a {type(x).__name__}"
        if (reason := ambient()) is not None:
            return reason
        if not torch.compiler.is_compiling() and not _is_dense(x):
            return "its input has no plain values in memory"
        # a forward may ask any of the modules for its mode
        if any(getattr(module, name) for module, name in self.dropouts) and (
            owner.training or any(child.training for _, child in self.guard.modules)
        ):
            return "dropout is in force"
        device, products = x.device, products_now(x)
        # under autocast parameters may have another dtype than x, but have one
        dtype, like = (x.dtype, "x") if products is None else (self.dtype(), "the others")
        for module, name, shape in self.parameters:
            tensor = module._parameters.get(name)
            if tensor is None:
                plain = shape is None
            else:
                # tensors of a program that is being exported are fake ones
                plain = type(tensor) in PLAIN or torch.compiler.is_exporting()
                plain = plain and tensor.dtype is dtype and tensor.shape == shape
                plain = plain and (torch.compiler.is_compiling() or _is_dense(tensor))
            if not plain or (tensor is not None and tensor.device != device):
                return (
                    f"{name} of a {type(module).__name__} is no longer a plain {shape} tensor, or not one like {like}"
                )
        if products is not None and dtype is not None:
            for op in self.names:
                if (reason := unfit_dtypes(op, device.type, x.dtype, dtype, products)) is not None:
                    return f"autocast is on, and {reason}"
        return self.disturbance(owner)

    def dtype(self) -> torch.dtype | None:
        """That of the first parameter."""
        module, name, _ = self.parameters[0]
        tensor = module._parameters.get(name)
        return None if tensor is None else tensor.dtype

    def calls(self, when: When = NOW) -> list[tuple]:
        """Of each op that a call runs: its weights, then the numbers that their packed form depends on."""
        raise NotImplementedError

    names: tuple[str, ...] = ()  # of the ops
    refusals: dict[str, str] = {}  # why other ops, by name, do not stand in  # noqa: RUF012
    exports = False  # are its registered ops to be seen in exported programs?
    whole = True  # is nothing of the modules called?

    def disturbance(self, owner: nn.Module) -> str | None:
        """Why the modules' own forwards must run, as far as the modules tell."""
        if not torch.compiler.is_compiling() and self.guard.intact(owner):
            return None
        return self.guard.changed(owner) or self.guard.disturbed(owner)

    def needs_gradients(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [module._parameters.get(name) for module, name, _ in self.parameters]
        return x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def backend(self, owner: nn.Module) -> tuple[str | None, str]:
        """(name, "") of the backend that would run on the parameters' device and dtype, or (None, why not)."""
        like = next((t for m, n, _ in self.parameters if (t := m._parameters.get(n)) is not None), None)
        if like is None:
            return None, "its weight is no parameter"
        reason = self.obstacle(owner, like)
        if reason is not None:
            return None, reason
        name = _choose(like.device.type, like.dtype, self.settings.backend, products_now(like))
        return name, "" if name else "no backend is faster than plain torch here"


class FusedBlock(Fused):
    """How one block runs: `halves` are on the ops, what is not among them runs the block's own modules."""

    def __init__(
        self, layout: BlockLayout, settings: Settings, block: nn.Module, forward: Any, halves: dict[str, Any]
    ) -> None:
        names = [getattr(layout, half) for half in halves]
        super().__init__(
            settings,
            block,
            tuple(dict.fromkeys(root for name in names for root in read.roots(block, name))),
            [part for half in halves.values() for part in half.parts],
            [rate for name in names for rate in read.dropouts(block, name)],
            watched=layout is not PVT_FAST,
        )
        self.layout, self.forward = layout, forward
        self.arguments = required_parameters(forward)
        self.halves: dict[str, AttentionHalf | MlpHalf] = halves
        self.returns_tuple = False
        self.refusals = {}
        self.names = tuple(halves)
        self.channels = next(iter(halves.values())).norm.shapes[0][0]
        self.whole = len(halves) == 2
        self.drop_paths = {half: read.drop_path(block, getattr(layout, half)) for half in halves}

    # -- a call -----------------------------------------------------------------------------------------------------

    def run(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `block.forward(*args, **kwargs)` returns; None where the block's own forward must run."""
        call = self._bind(args, kwargs)
        if call is None:
            if not torch.compiler.is_compiling():
                log(self.what, "its arguments ask for more than tokens")
            return None
        x, hw = call
        backend = self.choose(block, x) if self._takes(x, hw) else None
        if backend is None:
            return None
        tokens = to_tokens(x) if self.layout.call == MAP else x
        return self.wrap(self.compute(block, backend, tokens, hw), hw)

    def calls(self, when: When = NOW) -> list[tuple]:
        return [(half.weights(False, when), half.spec(when)) for half in self.halves.values()]

    def compute(self, block: nn.Module, backend: str, x: Tensor, hw: HW) -> Tensor:
        """tokens x (B, N, C) -> (B, N, C)."""
        products = products_now(x)
        for name, names in (("attention", self.layout.attention), ("mlp", self.layout.mlp)):
            half = self.halves.get(name)
            # derived weights are computed in a compiled graph, so that an opaque op would pack them at each call
            opaque = torch.compiler.is_compiling() and backend != "reference"
            if half is None or (opaque and half.derived):
                x = self._run_own(block, names, x, hw)
            else:  # the half before may have brought gradients
                needs = self.needs_gradients(x)
                fresh = needs or torch.compiler.is_compiling()
                scale = _residual_scale(self.drop_paths[name], x, products)
                x = half.run(ops_of(backend, needs), x, hw, scale, fresh, products)
        return x

    def wrap(self, x: Tensor, hw: HW) -> Any:
        """Tokens in the form that the block's own forward returns."""
        result = to_map(x, hw) if self.layout.call == MAP else x
        return (result,) if self.returns_tuple else result

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, HW] | None:
        count = len(self.arguments)
        extra = {name: value for name, value in kwargs.items() if name not in self.layout.ignored}
        given, rest = args[:count], args[count:]
        for name in self.arguments[len(args) :]:
            if name not in extra:
                return None
            given += (extra.pop(name),)
        # attentions to be returned, a mask
        if any(value is not None and value is not False for value in (*rest, *extra.values())):
            return None
        x = given[0]
        if self.layout.call == MAP:
            size = tuple(x.shape[2:]) if isinstance(x, Tensor) else ()
        else:
            size = given[1] if self.layout.call == PAIR else given[1:]
        if (
            not isinstance(size, (tuple, list))
            or len(size) != 2
            or not all(isinstance(side, (int, torch.SymInt)) for side in size)
        ):
            return None
        return x, (size[0], size[1])

    def _takes(self, x: Any, hw: HW) -> bool:
        """Is x of a shape for these ops? Others meet the block's own errors."""
        if not isinstance(x, Tensor):
            return False
        shape = (
            (x.shape[0], self.channels, *hw) if self.layout.call == MAP else (x.shape[0], hw[0] * hw[1], self.channels)
        )
        if x.shape == shape and min(hw) >= max(half.min_size() for half in self.halves.values()):
            return True
        if not torch.compiler.is_compiling():
            log(self.what, f"its input is none of {self.channels} channels on a large enough map")
        return False

    def _run_own(self, block: nn.Module, names: AttentionNames | MlpNames, x: Tensor, hw: HW) -> Tensor:
        """One half on the block's own modules, as peers write it."""
        module: Any = attrgetter(names.module)(block)
        size: tuple = (hw,) if self.layout.call == PAIR else hw
        plain_mlp = self.layout is not PVT_FAST and isinstance(module, nn.Module)
        if plain_mlp and takes_tokens_only(type(module).forward):
            size = ()
        y = attrgetter(names.norm)(block)(x)
        if names.residual_inside:
            return module(y, *size, identity=x)
        y = module(y, *size)
        y = y[0] if isinstance(y, tuple) else y
        for step in (*(at(block, path) for path in names.after), first(block, names.drop_path)):
            y = y if step is None else step(y)
        return x + y


class FusedEmbed(Fused):
    """A patch embed: convolution, then LayerNorm."""

    names = ("patch_embed",)
    exports = True

    def __init__(self, settings: Settings, embed: nn.Module, proj: Part, norm: Part) -> None:
        super().__init__(settings, embed, ("proj", "norm"), (proj, norm))
        self.proj, self.norm = proj, norm

    def run(self, embed: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """image (B, Cin, H, W) -> tokens (B, N, C), H', W'; or None."""
        (image,) = args
        ops = self.ops(embed, image)
        if ops is None:
            return None
        x, hw = ops.patch_embed(image, *self.calls()[0], products_now(image))
        return x, *hw

    def calls(self, when: When = NOW) -> list[tuple]:
        weights = PatchEmbedWeights(linear_of(self.proj, when), norm_of(self.norm, when))
        return [(weights, when.setting(self.proj.module, "stride")[0])]


class FusedNorm(Fused):
    """A stage's LayerNorm."""

    names = ("layer_norm",)
    exports = True

    def __init__(self, settings: Settings, owner: nn.Module, name: str, norm: Part) -> None:
        super().__init__(settings, owner, (name,), (norm,))
        self.what = f"{name} of a {type(owner).__name__}"
        self.norm = norm

    def run(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Tokens (B, N, C) -> (B, N, C); or None."""
        (x,) = args
        ops = self.ops(owner, x)
        if ops is None:
            return None
        if products_now(x) is not None and norms_give_float32(x.device.type):
            x = x.float()
        return ops.layer_norm(x, norm_of(self.norm))

    def calls(self, when: When = NOW) -> list[tuple]:
        return [(norm_of(self.norm, when),)]


class FusedHead(Fused):
    """The mean over tokens, then the classifier, a linear."""

    names = ("head",)
    exports = True

    def __init__(self, settings: Settings, owner: nn.Module, name: str, linear: Part) -> None:
        super().__init__(settings, owner, (name,), (linear,))
        self.what = f"{name} of a {type(owner).__name__}"
        self.linear = linear

    def run(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """Tokens (B, N, C) -> logits (B, classes); or None."""
        (x,) = args
        ops = self.ops(owner, x)
        return None if ops is None else ops.head(x, linear_of(self.linear), products_now(x))

    def calls(self, when: When = NOW) -> list[tuple]:
        return [(linear_of(self.linear, when),)]


class StandIn:
    """What may stand in for a module of ours, or for children of it: read when the module is made, and again when it
    was changed. Copies and pickles are read from the copied module.

    reader(owner, settings) -> Fused; raises Refusal. roots: the children concerned; None means all.
    """

    def __init__(
        self,
        reader: Callable[[nn.Module, Settings], Any],
        settings: Settings,
        roots: tuple[str, ...] | None = None,
    ) -> None:
        self.reader, self.settings, self.roots = reader, settings, roots
        self.fused: Any = None
        self.refusal = "it was not read yet"
        self._read_from: Guard | None = None

    def run(self, owner: nn.Module, *args: Any) -> Any:
        """What the owner's own forward would return; None where that must run."""
        fused = self.fused
        if not torch.compiler.is_compiling():
            # the guard does not cover a half that was refused, which may have been mended
            if fused is None or not fused.whole or not fused.guard.intact(owner):
                fused = self.current(owner)
            if fused is None:
                where = f"{self.roots[0]} of a " if self.roots else ""
                log(f"{where}{type(owner).__name__}", self.refusal)
        return None if fused is None else fused.run(owner, args, {})

    def current(self, owner: nn.Module) -> Any:
        """The fused form of the owner as it is now; None with a `refusal` where there is none."""
        if self._is_of_another(owner):
            children = owner._modules.items()
            seen = Guard(edges((n, m) for n, m in children if self.roots is None or n in self.roots))
            try:
                self.fused, self.refusal = self.reader(owner, self.settings), ""
            except Refusal as refusal:
                self.fused, self.refusal = None, str(refusal)
            self._read_from = seen
        return self.fused

    def _is_of_another(self, owner: nn.Module) -> bool:
        """Must the owner be read again? It must where it differs from what was there before the reading, or from what
        was read: a module that was replaced and put back meanwhile is in one of the two.
        """
        if self._read_from is None or self._read_from.changed(owner) is not None:
            return True
        return self.fused is not None and self.fused.guard.changed(owner) is not None

    def follow(self, settings: Settings) -> None:
        """Take other settings, also for what was read."""
        self.settings = settings
        if self.fused is not None:
            self.fused.settings = settings

    def __deepcopy__(self, memo: dict) -> StandIn:
        return StandIn(self.reader, copy.deepcopy(self.settings, memo), self.roots)

    def __reduce__(self) -> tuple:
        return StandIn, (self.reader, self.settings, self.roots)


def ops_of(backend: str, needs_gradients: bool) -> Any:
    """A backend's ops, in the form that a call needs."""
    if needs_gradients or torch.compiler.is_compiling():
        return registered.registered(backend)
    return dispatch.load(backend)


def _is_dense(tensor: Tensor) -> bool:
    """Does the memory of `tensor` hold its values as they are?"""
    return tensor.layout is torch.strided and not tensor.is_neg()


def _residual_scale(module: nn.Module | None, x: Tensor, products: torch.dtype | None) -> Tensor | None:
    """Stochastic depth's factor per sample (B,), by the block's own module, so that it draws what it always drew, in
    the dtype of a branch's result.
    """
    if module is None or not module.training or not getattr(module, "drop_prob", 0.0):
        return None
    return module(x.new_ones((x.shape[0], 1, 1), dtype=products or x.dtype)).flatten()


@constant_while_traced
def _choose(device: str, dtype: torch.dtype, backend: str, products: torch.dtype | None) -> str | None:
    """Name of the backend that runs; None where "auto" finds none but the reference."""
    name = dispatch.select(Facts(device, dtype, products=products), backend).name
    return None if name == "reference" and dispatch.requested(backend) == "auto" else name


@cache
def log(owner: str, obstacle: str) -> None:
    """Say once that modules of a kind run their own forward."""
    logger.info("a %s runs its own forward: %s", owner, obstacle)
