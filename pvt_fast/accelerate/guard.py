"""May fused ops stand in for modules? Only where the modules' own forwards would do nothing else.

Two questions, each answered in one place, for our own models and for those of others: `ambient` asks whether torch is
in a state in which single operations must be seen, and `Guard` whether anything was done to the modules since they were
read: another module in place, another class, hooks, a forward of their own, other settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import _C

# torch has no public way to ask for these (2.10 to 2.13); tests/test_guard.py fails where one is renamed.
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Where transformers keeps hooks that do nothing unless an output is asked for; they stay once one was.
_CAPTURING = "transformers.utils.output_capturing"

# Attributes that the forward of a module which the ops stand in for reads.
SETTINGS = (
    "normalized_shape",
    "eps",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "approximate",
    "output_size",
    "num_heads",
    "scale",
)

Edge = tuple[nn.Module | None, str, nn.Module]  # parent (None: the owner of the guard), name, child


def ambient() -> str | None:
    """Why, whatever the modules, every operation must be torch's own now; None where it need not.

    Not asked while torch.compile traces, which has its own ways to see these.
    """
    if torch.jit.is_tracing():
        return "it is being traced"
    if _transforms() is not None:
        return "it runs under a transform of torch.func"
    if _dispatch_modes():
        return "a TorchDispatchMode is to see its operations"
    # torch.device(...) and set_default_device say only where new tensors go
    if _function_modes() and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return "a TorchFunctionMode is to see its operations"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are asked for"
    return None


def hooks_on_all_modules() -> bool:
    return any(_GLOBAL_HOOKS)


def edges(roots: Iterable[tuple[str, nn.Module]], parent: nn.Module | None = None) -> Iterator[Edge]:
    """The children `roots` of an owner and everything below them."""
    for name, child in roots:
        yield parent, name, child
        yield from edges(((n, m) for n, m in child._modules.items() if m is not None), child)


class Guard:
    """What was seen of some modules below an owner, to be compared with what is there now.

    The owner is given at each question, not kept: it keeps the guard. `changed` and `disturbed` are the specification;
    `intact` gives the same answer, at a fraction of the price, by comparing Python objects from C++.
    """

    def __init__(self, watched: Iterable[Edge]) -> None:
        self.edges = tuple(watched)
        modules = [child for _, _, child in self.edges]
        self.types = [type(module) for module in modules]
        self.sizes = [len(module._modules) for module in modules]
        self.settings = [{name: vars(module)[name] for name in SETTINGS if name in vars(module)} for module in modules]
        self.forwards = {kind: kind.forward for kind in self.types}
        self._facts: _C.Facts | None = None
        self._kept: Any = None  # alive while `_facts` is

    def intact(self, owner: nn.Module) -> bool:
        """Neither changed nor disturbed?"""
        if not self.classes_hold():
            return False
        if self._facts is not None and self._kept[0] is owner._modules and self._facts.hold():
            return True
        if self.changed(owner) is not None or self.disturbed() is not None:
            return False
        if not any(getattr(child, kind) for _, _, child in self.edges for kind in _HOOKS):  # hooks may be idle
            self._facts, self._kept = facts(owner, self.edges, self.types)
        return True

    def classes_hold(self) -> bool:
        """Does nothing hold for all modules, or all of a class, that did not?"""
        return not hooks_on_all_modules() and all(kind.forward is known for kind, known in self.forwards.items())

    def changed(self, owner: nn.Module) -> str | None:
        """How the modules are others than were seen, or do something else."""
        for (parent, name, child), kind, size, settings in zip(
            self.edges, self.types, self.sizes, self.settings, strict=True
        ):
            if (owner if parent is None else parent)._modules.get(name) is not child:
                return f"its {name} was replaced"
            if type(child) is not kind:
                return f"its {name} has become a {type(child).__name__}"
            if kind.forward is not self.forwards[kind]:
                return f"the forward of {kind.__name__} was replaced"
            if len(child._modules) != size:
                return f"its {name} has other modules within"
            for setting, value in settings.items():
                if (now := vars(child).get(setting)) is not value and now != value:
                    return f"{setting} of its {name} was changed"
        return None

    def disturbed(self) -> str | None:
        """What was done to the modules that only their own forward honours."""
        if hooks_on_all_modules():
            return "there are hooks on all modules"
        for _, name, child in self.edges:
            if (
                child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            ) and not _are_idle(child):
                return f"there are hooks on its {name}"
            if "forward" in child.__dict__:
                return f"its {name} has a forward of its own"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_facts": None, "_kept": None}


def facts(
    owner: nn.Module,
    watched: Iterable[Edge],
    types: Iterable[type],
    more: Iterable[tuple[dict, str, Any]] = (),
    soon: Sequence[int] = (),
) -> tuple[_C.Facts, tuple]:
    """What `Guard.changed` and `Guard.disturbed` look at, as it is now, with `more` values of dicts; and what to keep
    alive for it, beginning with the owner's dict of modules."""
    entries, sizes, kinds = list(more), [], []
    for (parent, name, child), kind in zip(watched, types, strict=True):
        values = vars(child)
        kinds.append((child, kind))
        entries.append(((owner if parent is None else parent)._modules, name, child))
        entries += [(values, "forward", None), (values, "_modules", values["_modules"])]
        entries += [(values, setting, values[setting]) for setting in SETTINGS if setting in values]
        sizes.append((values["_modules"], len(values["_modules"])))
        for hooks in _HOOKS:
            entries.append((values, hooks, values[hooks]))
            sizes.append((values[hooks], 0))
    return _C.Facts(entries, sizes, kinds, soon), (owner._modules, entries, sizes, kinds)


def _are_idle(module: nn.Module) -> bool:
    """Are all hooks of `module` transformers' own, with no attentions asked for now?"""
    hooks = (*module._forward_hooks.values(),)
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    # hidden states are taken of whole stages and blocks
    return collected is None or set(collected) <= {"hidden_states", "_hidden_states_layers"}
