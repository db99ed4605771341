"""May fused ops stand in for modules? Only where the modules' own forwards would do nothing else.

Two questions, each answered in one place, for our own models and for those of others: `ambient` asks whether torch is
in a state in which single operations must be seen, and `Guard` whether anything was done to the modules since they were
read: another module in place, another class, hooks, a forward of their own, other settings.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import CodeType
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
_HELD = ("_modules", "_parameters", "_buffers")

# Of a module's attributes: what may change without another forward, or is read at each call.
_READ_AT_CALLS = ("training", "p", "drop_prob", "inplace")
# transformers' names of attention as the ops compute it; under another name is a user's function.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

Edge = tuple[nn.Module | None, str, nn.Module]  # parent (None: the owner of the guard), name, child


def transformed() -> bool:
    """Does a transform of torch.func apply? The compiler enters them as it traces."""
    return _transforms() is not None


transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see library


def ambient() -> str | None:
    """Why, whatever the modules, every operation must be torch's own now; None where it need not."""
    if transformed():
        return "it runs under a transform of torch.func"
    if torch.compiler.is_compiling():  # which has its own ways to see what follows
        return None
    if torch.jit.is_tracing():
        return "it is being traced"
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


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The plain values among a module's attributes that its methods name; all of them where it has a configuration, as
    transformers' attentions do, whose methods hand the module to functions.
    """
    named = _names_in(type(module))  # type: ignore[arg-type]  # classes can be hashed
    return {
        name: value
        for name, value in vars(module).items()
        if (name in named or "config" in vars(module))
        and isinstance(value, (bool, int, float, str, tuple, list, type(None)))
        and name not in _READ_AT_CALLS
        and not name.startswith("_")
    }


def methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    """What a call of a module of this class runs: its `forward`, and by name the methods that this one calls."""
    found = {"__call__": kind.__call__, "__getattr__": kind.__getattr__}
    named = ["forward"]
    while named:
        name = named.pop()
        method = getattr(kind, name, None)
        if name not in found and inspect.isfunction(method):
            found[name] = method
            named += _names(method)
    return found


def _names(function: Any) -> Iterator[str]:
    """The names in the code of a function, and of the functions within it."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            yield from code.co_names
            codes += code.co_consts


@lru_cache(1024)
def _names_in(kind: type[nn.Module]) -> frozenset[str]:
    """The names in the methods of a class; where one of these is replaced, a guard sees that."""
    methods = (method for name, method in methods_of(kind).items() if not name.startswith("__"))
    return frozenset(name for method in methods for name in _names(method))


def attention_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations of transformers by whose `_attn_implementation` some of the modules choose their attention."""
    configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]


def own_attention(configs: Iterable[Any]) -> str | None:
    """The name of an attention that is none of transformers' own, if one is chosen."""
    return next((name for config in configs if (name := config._attn_implementation) not in _ATTENTIONS), None)


class Kinds:
    """Classes of modules with the methods that they have now."""

    def __init__(self, kinds: Iterable[type[nn.Module]]) -> None:
        self.kinds = [(kind, methods_of(kind)) for kind in kinds]

    def include(self, module: nn.Module) -> bool:
        """Is `module` of one of the classes, or of a subclass with all of these methods? What its instance hides is for
        a guard to see.
        """
        kind = type(module)
        return any(
            isinstance(module, known) and all(getattr(kind, name) is method for name, method in methods.items())
            for known, methods in self.kinds
        )

    def describe(self, module: nn.Module) -> str:
        """What a module is that they do not include: its class, by its full name where one of these has its name."""
        kind = type(module)
        for known, methods in self.kinds:
            if kind is known:
                replaced = next(name for name, method in methods.items() if getattr(kind, name) is not method)
                return f"{kind.__name__} whose {replaced} was replaced"
            if kind.__name__ == known.__name__:
                return f"{kind.__module__}.{kind.__qualname__}"
        return kind.__name__


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
        self.sizes = [_sizes(module) for module in modules]
        self.settings = [settings_of(module) for module in modules]
        methods = {kind: methods_of(kind) for kind in self.types}
        self.methods = [(kind, name, method) for kind in methods for name, method in methods[kind].items()]
        # what an attribute of the instance would hide
        self.hidden = [
            frozenset((*methods[kind], *module._parameters)) for kind, module in zip(self.types, modules, strict=True)
        ]
        self.configs = attention_configs(modules)
        self._facts: _C.Facts | None = None
        self._kept: Any = None  # alive while `_facts` is

    def intact(self, owner: nn.Module) -> bool:
        """Neither changed nor disturbed?"""
        if not self.others_hold():
            return False
        if self._facts is not None and self._kept[0] is owner._modules and self._facts.hold():
            return True
        if self.changed(owner) is not None or self.disturbed() is not None:
            return False
        if not any(getattr(child, kind) for _, _, child in self.edges for kind in _HOOKS):  # hooks may be idle
            self._facts, self._kept = facts(owner, self.edges, self.types)
        return True

    def others_hold(self) -> bool:
        """Is all as it was that is not the modules' own: hooks on all of them, their classes' methods, their model's
        choice of attention?
        """
        return (
            not hooks_on_all_modules()
            and all(getattr(kind, name) is known for kind, name, known in self.methods)
            and own_attention(self.configs) is None
        )

    def changed(self, owner: nn.Module) -> str | None:
        """How the modules are others than were seen, or do something else."""
        for (parent, name, child), kind, size, settings in zip(
            self.edges, self.types, self.sizes, self.settings, strict=True
        ):
            if (owner if parent is None else parent)._modules.get(name) is not child:
                return f"its {name} was replaced"
            if type(child) is not kind:
                return f"its {name} has become a {type(child).__name__}"
            if _sizes(child) != size:
                return f"its {name} has other modules, parameters or buffers within"
            for setting, value in settings.items():
                if (now := vars(child).get(setting)) is not value and now != value:
                    return f"{setting} of its {name} was changed"
        for kind, name, known in self.methods:  # __call__ and __getattr__ are replaced while torch.export traces
            if getattr(kind, name) is not known and not (name.startswith("__") and torch.compiler.is_exporting()):
                return f"the {name} of {kind.__name__} was replaced"
        return None

    def disturbed(self) -> str | None:
        """What was done to the modules that only their own forward honours."""
        if hooks_on_all_modules():
            return "there are hooks on all modules"
        if (attention := own_attention(self.configs)) is not None:
            return f"its attention is a function of its own, {attention!r}"
        for (_, name, child), hidden in zip(self.edges, self.hidden, strict=True):
            if (
                child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            ) and not _are_idle(child):
                return f"there are hooks on its {name}"
            if not hidden.isdisjoint(child.__dict__):  # of `in` the compiler would keep no guard
                return f"its {name} has a {sorted(hidden & child.__dict__.keys())[0]} of its own"
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
        entries.append((values, "_modules", values["_modules"]))
        entries += [(values, setting, value) for setting, value in settings_of(child).items()]
        # of its attributes: one more may hide a method
        sizes += [(held, len(held)) for held in (values, *(values[kind] for kind in _HELD))]
        for hooks in _HOOKS:
            entries.append((values, hooks, values[hooks]))
            sizes.append((values[hooks], 0))
    return _C.Facts(entries, sizes, kinds, soon), (owner._modules, entries, sizes, kinds)


def _sizes(module: nn.Module) -> tuple[int, ...]:
    return tuple(len(vars(module)[kind]) for kind in _HELD)


def _are_idle(module: nn.Module) -> bool:
    """Are all hooks of `module` transformers' own, with no attentions asked for now?"""
    hooks = (*module._forward_hooks.values(),)
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks):
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    # hidden states are taken of whole stages and blocks
    return collected is None or set(collected) <= {"hidden_states", "_hidden_states_layers"}
