"""May fused ops stand in for modules? Only where the modules' own forwards would do nothing else.

Two questions, each answered in one place, for our own models and for those of others: `ambient` asks whether torch is
in a state in which single operations must be seen, and `Guard` whether anything was done to the modules since they were
read: another module in place, another class, hooks, a forward of their own, other settings.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .. import _C
from ..ops import forward_mode
from ..ops.traceable import constant_while_traced

# torch has no public way to ask for these (2.10 to 2.13); tests/accelerate/test_guard.py fails where one is renamed.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_transforms = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Where transformers keeps hooks that do nothing unless an output is asked for; they stay once one was.
CAPTURING = "transformers.utils.output_capturing"
_HELD = ("_modules", "_parameters", "_buffers")
# The attribute of an accelerated block's class that has the block's own.
ACCELERATED_FROM = "_accelerated_from"

Dropout = nn.modules.dropout._DropoutNd
# What a convolution keeps for a kind of padding that no op has.
_UNUSED = "_reversed_padding_repeated_twice"
_OF_EVERY_MODULE = frozenset((*vars(nn.Module()), "_fused"))  # and what modules of ours have
# What runs before a module's forward, and where its names are looked up.
_EVERY_CALL = ("__call__", "_call_impl", "__getattr__", "__getattribute__")
# Classes of immutable values.
_PLAIN = (bool, int, float, str, tuple)
_METHODS = (FunctionType, staticmethod, classmethod)
_CONSTANTS = (bool, int, float, str, type(None), type, torch.dtype, torch.device, BuiltinFunctionType)
# transformers' names of attention as the ops compute it; under another name is a user's function.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

Edge = tuple[nn.Module | None, str, nn.Module | None]  # parent (None: the owner of the guard), name, child


@constant_while_traced
def transformed() -> bool:
    """Does a transform of torch.func apply? The compiler enters them as it traces."""
    return _transforms() is not None


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
    if forward_mode():
        return "forward-mode derivatives are asked for"
    return None


def products_now(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives products on the device of x; None where it is off."""
    kind = x.device.type  # not x.is_meta, which a compiler keeps as an operation
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def hooks_on_all_modules() -> bool:
    return any(GLOBAL_HOOKS)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its methods name. All attributes where the module has a configuration: the
    methods of transformers' attentions hand the module on to functions.
    """
    named = _names_in(type(module)) - {_UNUSED, rate_of(module), "inplace" if _is_bare(module) else None}
    return {
        name: value
        for name, value in vars(module).items()
        if (name in named or "config" in vars(module)) and name not in _OF_EVERY_MODULE
    }


def rate_of(module: nn.Module) -> str | None:
    """The name of the attribute that has the rate of a dropout or of a stochastic depth, which is read at each call."""
    if isinstance(module, Dropout):
        return "p"
    return "drop_prob" if _is_bare(module) and "drop_prob" in vars(module) else None


def _is_bare(module: nn.Module) -> bool:
    return not module._modules and not module._parameters and not module._buffers


def unseen_change(module: nn.Module) -> str | None:
    """What `module`'s methods read that can change in place, in words: a list, or a tensor that is no parameter."""
    kind = type(module)
    for name, value in settings_of(module).items():
        if not is_constant(value) and not hasattr(value, "_attn_implementation"):  # see attention_configs
            return f"a {type(value).__name__} at {name}"
    for name in _names_in(kind) - vars(module).keys():
        value = inspect.getattr_static(kind, name, None)
        if not name.startswith("__") and not isinstance(value, _METHODS) and not is_constant(value):
            return f"a {type(value).__name__} at {name}"
    return None


def is_constant(value: Any) -> bool:
    """Is `value` immutable, so that only an assignment puts another in its place?"""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    if inspect.isfunction(value):
        return value.__closure__ is None
    return isinstance(value, _CONSTANTS)


def methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    """The methods that a call of a module of this class may run: `forward`, those that it names, those that these name,
    and so on.
    """
    found = {name: getattr(kind, name) for name in _EVERY_CALL}
    named = ["forward"]
    while named:
        name = named.pop()
        value = None if name in found or name.startswith("__") else getattr(kind, name, None)
        if value is not None and getattr(kind, name) is value:  # a class method is made anew each time
            found[name] = value
            named += (other for _, method in definitions(kind, name) for other in _names(method))
    return found


def definitions(kind: type[nn.Module], name: str) -> list[tuple[type, Any]]:
    """(class, method of that name) of a class and of its bases but nn.Module: a method may call those by super()."""
    return [
        (base, getattr(base, name))
        for base in kind.__mro__
        if base is kind or (name in vars(base) and base not in (nn.Module, object))
    ]


def _names(function: Any) -> Iterator[str]:
    """All names in the code of a function, of functions nested in it, and of functions of the same file that it calls,
    which it may hand the module to.
    """
    functions, seen = [inspect.unwrap(function)] if callable(function) else [], set()
    while functions:
        function = functions.pop()
        if not inspect.isfunction(function) or function in seen:
            continue
        seen.add(function)
        functions += (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        codes: list[Any] = [function.__code__]
        while codes:
            code = codes.pop()
            if isinstance(code, CodeType):
                yield from code.co_names
                codes += code.co_consts
                beside = (function.__globals__.get(name) for name in code.co_names)
                functions += (f for f in beside if getattr(f, "__module__", None) == function.__module__)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names_in(kind: type[nn.Module]) -> frozenset[str]:
    """All names in the methods that a call of this class may run. Where one of the methods is replaced, a guard sees
    that.
    """
    return _names_with(kind, kind.forward)  # type: ignore[arg-type]  # classes can be hashed


@lru_cache(1024)
def _names_with(kind: type[nn.Module], forward: Any) -> frozenset[str]:
    called = (name for name in methods_of(kind) if name not in _EVERY_CALL)
    methods = (method for name in called for _, method in definitions(kind, name))
    return frozenset(name for method in methods for name in _names(method))


def attention_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations of transformers by whose `_attn_implementation` some of the modules choose their attention."""
    configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]


def own_attention(configs: Iterable[Any]) -> str | None:
    """The name of a chosen attention that is not one of transformers' own, if there is one."""
    return next((name for config in configs if (name := config._attn_implementation) not in _ATTENTIONS), None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before it was accelerated."""
    return getattr(type(module), ACCELERATED_FROM, type(module))


class Kinds:
    """Classes of modules with the methods that they have now."""

    def __init__(self, kinds: Iterable[type[nn.Module]]) -> None:
        self.kinds = [(kind, methods_of(kind)) for kind in kinds]

    def include(self, module: nn.Module) -> bool:
        """Is `module` of one of the classes, or of a subclass that keeps all of these methods? Attributes of the
        instance that hide a method are for a guard to see.
        """
        kind = type(module)
        return any(
            isinstance(module, known) and all(getattr(kind, name) is method for name, method in methods.items())
            for known, methods in self.kinds
        )

    def describe(self, module: nn.Module) -> str:
        """What a module that they do not include is: the name of its class, in full where one of these has the same
        name.
        """
        kind = type(module)
        for known, methods in self.kinds:
            if kind is known:
                replaced = next(name for name, method in methods.items() if getattr(kind, name) is not method)
                return f"{kind.__name__} whose {replaced} was replaced"
            if kind.__name__ == known.__name__:
                return f"{kind.__module__}.{kind.__qualname__}"
        return kind.__name__


def edges(roots: Iterable[tuple[str, nn.Module | None]], parent: nn.Module | None = None) -> Iterator[Edge]:
    """The children `roots` of an owner and everything below them, with the places where there is none."""
    for name, child in roots:
        yield parent, name, child
        if child is not None:
            yield from edges(child._modules.items(), child)


class Guard:
    """What was seen of some modules below an owner, to be compared with what is there now; of the owner's own
    attributes and methods, too, if it is given here.

    The owner is given again at each question, not kept: it keeps the guard. `changed` and `disturbed` are the
    specification; `intact` gives the same answer, at a fraction of the price, by comparing Python objects from C++.
    """

    # With what it needs alive, in one attribute as other threads read it. Copies and pickles have none.
    snapshot: tuple[_C.AttributeSnapshot, tuple] | None = None

    def __init__(self, watched: Iterable[Edge], owner: nn.Module | None = None) -> None:
        self.edges = tuple(watched)
        self.modules = [(name, child) for _, name, child in self.edges if child is not None]
        children = [child for _, child in self.modules]
        self.types = [type(module) for module in children]
        self.sizes = [_sizes(module) for module in children]
        self.settings = [settings_of(module) for module in children]
        self.hidden = [hidden_by(module) for module in children]
        self.roots = frozenset(name for parent, name, _ in self.edges if parent is None)
        self.owner: tuple[dict[str, Any], frozenset[str]] = ({}, self.roots)
        if owner is not None:
            self.owner = (settings_of(owner), hidden_by(owner) | self.roots)
        # with places that hold no module; not for an owner whose other children are called
        self.children = None if owner is None else (tuple(owner._modules.items()), _sizes(owner))
        kinds = dict.fromkeys(self.types if owner is None else [*self.types, own_class(owner)])
        self.methods = [
            (definer, name, method)
            for kind in kinds
            for name in methods_of(kind)
            for definer, method in definitions(kind, name)
        ]
        self.configs = attention_configs(children)

    def intact(self, owner: nn.Module) -> bool:
        """Neither changed nor disturbed?"""
        if not self.others_hold():
            return False
        known = self.snapshot
        if known is not None and known[1][0] is owner._modules and known[0].holds(owner):
            return True
        seen = snapshot(owner, self)  # before it is known that they are as they were
        if self.changed(owner) is not None or self.disturbed(owner) is not None:
            return False
        if not any(getattr(child, kind) for _, child in self.modules for kind in HOOKS):  # hooks may be idle
            self.snapshot = seen
        return True

    def others_hold(self) -> bool:
        """Does everything outside the modules still hold: no hooks on all modules, the methods of their classes, the
        attention that their model chose?
        """
        return (
            not hooks_on_all_modules()
            and all(getattr(kind, name) is known for kind, name, known in self.methods)
            and own_attention(self.configs) is None
        )

    def changed(self, owner: nn.Module) -> str | None:
        """What has been replaced or set otherwise since, in words; None if nothing."""
        for parent, name, child in self.edges:
            if (owner if parent is None else parent)._modules.get(name) is not child:
                return f"its {name} was replaced"
        for (name, child), kind, size, settings in zip(
            self.modules, self.types, self.sizes, self.settings, strict=True
        ):
            if type(child) is not kind:
                return f"its {name} has become a {type(child).__name__}"
            if _sizes(child) != size:
                return f"its {name} has other modules, parameters or buffers within"
            if (setting := _changed_setting(child, settings)) is not None:
                return f"{setting} of its {name} was changed"
        if (setting := _changed_setting(owner, self.owner[0])) is not None:
            return f"its {setting} was changed"
        if self.children is not None:
            known, sizes = self.children
            if _sizes(owner) != sizes or not all(owner._modules.get(name) is value for name, value in known):
                return "it has other modules, parameters or buffers"
        for kind, name, known in self.methods:  # some are replaced while torch.export traces
            if getattr(kind, name) is not known and not (name in _EVERY_CALL and torch.compiler.is_exporting()):
                return f"the {name} of {kind.__name__} was replaced"
        return None

    def disturbed(self, owner: nn.Module) -> str | None:
        """What was done to the modules that only their own forward honours."""
        if hooks_on_all_modules():
            return "there are hooks on all modules"
        if (attention := own_attention(self.configs)) is not None:
            return f"its attention is a function of its own, {attention!r}"
        for (name, child), hidden in zip(self.modules, self.hidden, strict=True):
            if (
                child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
            ) and not _are_idle(child):
                return f"there are hooks on its {name}"
            if not hidden.isdisjoint(child.__dict__):  # of `in` the compiler would keep no guard
                return f"its {name} has a {sorted(hidden & child.__dict__.keys())[0]} of its own"
        if not self.owner[1].isdisjoint(owner.__dict__):
            return f"it has a {sorted(self.owner[1] & owner.__dict__.keys())[0]} of its own"
        for name in self.roots:
            if hasattr(type(owner), name):
                return f"its class has a {name}"
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "snapshot"}


def snapshot(
    owner: nn.Module, guard: Guard, parameters: bool = False, soon: Sequence[int] = ()
) -> tuple[_C.AttributeSnapshot, tuple]:
    """What `Guard.changed` and `Guard.disturbed` look at, as it is now, with the modules' `parameters` if asked for;
    and what to keep alive for it, beginning with the owner's dict of modules."""
    objects: list[tuple] = []
    dicts: list[tuple[dict, list]] = [(owner._modules, _items(owner._modules, owner._modules))]
    own = settings_of(owner) if guard.owner[0] else {}
    objects.append((None, type(owner), _items(vars(owner), own)))
    if guard.children is not None:
        dicts += [(held, _items(held)) for held in (owner._parameters, owner._buffers)]
    for _, child in guard.modules:
        values = vars(child)
        fixed = {**settings_of(child), **{name: values[name] for name in (*_HELD, *HOOKS)}}
        if parameters and not {"p", "drop_prob"}.isdisjoint(values):  # to others it means nothing, and new ones train
            fixed["training"] = False
        objects.append((child, type(child), _items(values, fixed)))
        dicts.append((child._modules, _items(child._modules, child._modules)))
        dicts.append((child._parameters, _items(child._parameters, child._parameters if parameters else {})))
        dicts += [(values[name], _items(values[name])) for name in ("_buffers", *HOOKS)]
    return _C.AttributeSnapshot(objects, dicts, soon), (owner._modules, objects, dicts)


class When:
    """Where the settings and parameters of modules are read: here in the modules themselves, at each reading."""

    def setting(self, module: nn.Module, name: str) -> Any:
        return getattr(module, name)

    def parameter(self, module: nn.Module, name: str) -> Any:
        return module._parameters.get(name)


NOW = When()


class Moment(When):
    """Reads what a `snapshot` with parameters kept. None for modules that it does not know."""

    def __init__(self, kept: tuple) -> None:
        _, objects, dicts = kept
        self._objects = {id(module): dict(items) for module, _, items in objects}
        self._dicts = {id(of): dict(items) for of, items in dicts}

    def setting(self, module: nn.Module, name: str) -> Any:
        return self._objects.get(id(module), {}).get(name)

    def parameter(self, module: nn.Module, name: str) -> Any:
        return self._dicts.get(id(self.setting(module, "_parameters")), {}).get(name)


def _items(all_of: Mapping[str, Any], fixed: Mapping[str, Any] = MappingProxyType({})) -> list[tuple[str, Any]]:
    return [(name, fixed.get(name, ...)) for name in all_of]


def _changed_setting(module: nn.Module, settings: dict[str, Any]) -> str | None:
    """The name of an attribute that has another value now."""
    for setting, value in settings.items():
        now = vars(module).get(setting)
        if now is not value and not (isinstance(value, _PLAIN) and type(now) is type(value) and now == value):
            return setting
    return None


def hidden_by(module: nn.Module) -> frozenset[str]:
    """The names that `module`'s methods find elsewhere, and that an attribute of `module` itself would hide."""
    kind = type(module)
    named = _names_in(kind) - vars(module).keys()
    return frozenset((*methods_of(kind), *module._parameters, *named))


def _sizes(module: nn.Module) -> tuple[int, ...]:
    return tuple(len(vars(module)[kind]) for kind in _HELD)


def _are_idle(module: nn.Module) -> bool:
    """Are all hooks of `module` transformers' own, with no attentions asked for now?"""
    hooks = (*module._forward_hooks.values(),)
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
        return False
    collected = sys.modules[CAPTURING]._active_collector.get()
    # hidden states are taken of whole stages and blocks
    return collected is None or set(collected) <= {"hidden_states", "_hidden_states_layers"}
