"""A block's forward on the contract's ops, and all that must hold at a call for it to stand in for the block's own.

The state lives in the block that it accelerates. Copies and pickles of the block take it along: it holds the block's
inner modules, which are copied with the block, and no packed weights.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import autograd, dispatch, library, reference
from ..ops import HW, to_map, to_tokens
from . import read
from .halves import AttentionHalf, MlpHalf
from .layout import MAP, PAIR, AttentionNames, Layout, MlpNames, at, first, required_parameters

_PLAIN = (nn.Parameter, Tensor)

logger = logging.getLogger("pvt_fast")

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
# Where transformers keeps hooks that do nothing unless an output is asked for; they stay once one was.
_CAPTURING = "transformers.utils.output_capturing"


class FusedBlock:
    """How one block runs: `halves` are accelerated, what is not among them runs the block's own modules."""

    def __init__(self, layout: Layout, backend: str, block: nn.Module, forward: Any, halves: dict[str, Any]) -> None:
        self.layout, self.backend = layout, backend
        self.arguments = required_parameters(forward)
        self.halves: dict[str, AttentionHalf | MlpHalf] = halves
        self.returns_tuple = False
        self.channels = next(iter(halves.values())).norm.shapes[0][0]
        names = [getattr(layout, half) for half in halves]
        # (module, name, shape) of every weight and bias
        self.parameters = [
            (part.module, name, shape)
            for half in halves.values()
            for part in half.parts
            for name, shape in zip(part.names, part.shapes, strict=True)
        ]
        self.drop_paths = {half: read.drop_path(block, getattr(layout, half)) for half in halves}
        self.dropouts = [rate for name in names for rate in read.dropouts(block, name)]
        roots = dict.fromkeys(root for name in names for root in read.roots(block, name))
        # (parent, name, child) of every inner module that the ops stand in for; the parent None is the block
        self.watched = [edge for root in roots for edge in _edges(None, root, getattr(block, root))]

    # -- a call -----------------------------------------------------------------------------------------------------

    def run(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `block.forward(*args, **kwargs)` returns; None where the block's own forward must run."""
        call = self._bind(args, kwargs)
        obstacle = "its arguments ask for more than tokens" if call is None else self._obstacle(block, *call)
        if obstacle is None and call is not None:
            x, hw = call
            tokens = to_tokens(x) if self.layout.call == MAP else x
            fresh = torch.compiler.is_compiling() or self._needs_gradients(x)
            ops = self._ops(x, fresh)
            if ops is not None:
                return self.wrap(self.compute(block, ops, tokens, hw, fresh), hw)
            obstacle = "no backend is faster than plain torch here"
        if not torch.compiler.is_compiling():
            _log(type(block).__name__, obstacle)
        return None

    def compute(self, block: nn.Module, ops: Any, x: Tensor, hw: HW, fresh: bool) -> Tensor:
        """tokens x (B, N, C) -> (B, N, C); `fresh` as in `halves`."""
        opaque = torch.compiler.is_compiling() and ops is not reference
        for name, names in (("attention", self.layout.attention), ("mlp", self.layout.mlp)):
            half = self.halves.get(name)
            # derived weights are computed in a compiled graph, so that an opaque op would pack them at each call
            if half is None or (opaque and half.derived):
                x = self._run_own(block, names, x, hw)
            else:
                x = half.run(ops, x, hw, _residual_scale(self.drop_paths[name], x), fresh)
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

    def _obstacle(self, block: nn.Module, x: Tensor, hw: HW) -> str | None:
        """Why the ops cannot stand in for the block's own forward in this call."""
        if type(x) not in _PLAIN:
            return f"x is a {type(x).__name__}"
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return "it is being exported or traced"
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return "it runs under a transform of torch.func"
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        shape = (
            (x.shape[0], self.channels, *hw) if self.layout.call == MAP else (x.shape[0], hw[0] * hw[1], self.channels)
        )
        if x.shape != shape or min(hw) < max(half.least_size() for half in self.halves.values()):
            return f"x of shape {tuple(x.shape)} is none of {self.channels} channels on a large enough map"
        if any(module.training and getattr(module, name) for module, name in self.dropouts):
            return "dropout is in force"
        dtype, device = x.dtype, x.device
        for module, name, shape in self.parameters:
            tensor = module._parameters.get(name)
            if tensor is None:
                plain = shape is None
            else:
                plain = type(tensor) in _PLAIN and tensor.dtype is dtype and tensor.shape == shape
            if not plain or (tensor is not None and tensor.device != device):
                return f"{name} of a {type(module).__name__} is no longer a plain {shape} tensor, or not one like x"
        return self.disturbance(block)

    def disturbance(self, block: nn.Module) -> str | None:
        """Why the inner modules are not to be passed over: hooks on them, a forward of their own, others in place."""
        if any(_GLOBAL_HOOKS):
            return "there are hooks on all modules"
        for parent, name, child in self.watched:
            if (block if parent is None else parent)._modules.get(name) is not child:
                return f"its {name} was replaced"
            if (
                child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            ) and not _are_idle(child):
                return f"there are hooks on its {name}"
            if "forward" in child.__dict__:
                return f"its {name} has a forward of its own"
        return None

    def _needs_gradients(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [module._parameters.get(name) for module, name, _ in self.parameters]
        return x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def _ops(self, x: Tensor, needs_gradients: bool) -> Any:
        """The ops for x; None where only the reference is left and nobody asked for it."""
        name = _choose(x.device.type, x.dtype, self.backend)
        if name is None:
            return None
        if torch.compiler.is_compiling():
            return library.traced(dispatch.Facts(x.device.type, x.dtype), name)
        module: Any = dispatch.load(name)
        return autograd.differentiable(module) if needs_gradients else module

    def _run_own(self, block: nn.Module, names: AttentionNames | MlpNames, x: Tensor, hw: HW) -> Tensor:
        """One half on the block's own modules, as peers write it."""
        module = at(block, names.module)
        size: tuple = (hw,) if self.layout.call == PAIR else hw
        if len(required_parameters(type(module).forward)) == 1:  # a plain MLP
            size = ()
        y = at(block, names.norm)(x)
        if names.residual_inside:
            return module(y, *size, identity=x)
        y = module(y, *size)
        y = y[0] if isinstance(y, tuple) else y
        for step in (*(at(block, path) for path in names.after), first(block, names.drop_path)):
            y = y if step is None else step(y)
        return x + y


def _residual_scale(module: nn.Module | None, x: Tensor) -> Tensor | None:
    """Stochastic depth's factor per sample (B,), by the block's own module, so that it draws what it always drew."""
    if module is None or not module.training or not getattr(module, "drop_prob", 0.0):
        return None
    return module(x.new_ones((x.shape[0], 1, 1))).flatten()


def _edges(parent: nn.Module | None, name: str, child: nn.Module) -> Iterator[tuple[nn.Module | None, str, nn.Module]]:
    yield parent, name, child
    for inner, module in child.named_children():
        yield from _edges(child, inner, module)


def _are_idle(module: nn.Module) -> bool:
    """Are all hooks of `module` transformers' own, with no attentions asked for now?"""
    hooks = (*module._forward_hooks.values(),)
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    # hidden states are taken of whole stages and blocks
    return collected is None or set(collected) <= {"hidden_states", "_hidden_states_layers"}


def _choose(device: str, dtype: torch.dtype, backend: str) -> str | None:
    """Name of the backend that runs; None where "auto" finds none but the reference."""
    module = dispatch.select(dispatch.Facts(device, dtype), backend)
    if module is reference and dispatch.requested(backend) == "auto":
        return None
    return next(name for name, path in dispatch.ORDER.items() if path == module.__name__)


_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see library


@cache
def _log(block: str, obstacle: str) -> None:
    logger.info("a %s runs its own forward: %s", block, obstacle)
