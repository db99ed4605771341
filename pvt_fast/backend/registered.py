"""The ops of the contract as registered `torch.library` ops: for gradients, torch.compile and torch.export.

They are the one way to gradients: whatever needs one calls `torch.ops.pvt_fast.*`, whose backward is the backend's own
where it has one, else the reference's, which recomputes the op: so a training step keeps only each op's arguments
alive, not its inner activations. Without gradients eager code calls a backend's functions directly: a registered op
costs microseconds a call.

An op's schema is derived from the reference's function and the tuples of the contract: no weight has a name here.
Those with products of their own (mixed precision) are ops beside them, so that exported programs keep theirs.
`registered(name)` answers the ops of the contract: for "reference" that itself, so that a compiler sees plain torch and
fuses it, else the registered ones, opaque to the compiler, which hand on to the backend named in their last argument.

The choice of a backend is made while tracing and baked into the graph. A change of `model.backend`, or of
`use_backend`, retraces a compiled model; an exported one keeps its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from .. import _earlier, ops
from ..ops import (
    HW,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Linear,
    MlpSpec,
    MlpWeights,
    Norm,
    PatchEmbedWeights,
    reference,
)
from ..ops.packing import within_graph
from . import dispatch

# What follows the backend's name in an op that was traced into a graph, which may change weights after it.
_IN_GRAPH = " in a graph"

# Exported and packaged programs of earlier versions call the ops by earlier names, and their arguments by these.
_EARLIER_ARGUMENTS = {
    "patch_embed": {"proj_weight": "weight", "proj_bias": "bias", "norm_eps": "eps"},
    "attention": {"norm_eps": "eps", "sr_norm_eps": "sr_eps"},
    "mlp": {"norm_eps": "eps"},
}


# -- schemas: an op's arguments as flat tensors and numbers -----------------------------------------------------------

_NUMBERS = {int: "int", float: "float", bool: "bool"}
_SPECS = (AttentionSpec, MlpSpec)


class _Leaf(NamedTuple):
    """A tensor or a number within the arguments of an op."""

    path: tuple[int, ...]  # the number of the argument, then those of the fields that lead to it
    name: str
    type: str  # in the schema
    order: int  # 0: activations and their size, 1: the other tensors, 2: the other numbers


class _Group(NamedTuple):
    """A tuple within the arguments. Parts are leaves or groups, and once their order is known places of leaves."""

    kind: Callable
    parts: tuple[Any, ...]
    optional: bool = False  # may it be None?


def _parsed(hint: Any, path: tuple[int, ...], names: tuple[str, ...], optional: bool = False) -> _Leaf | _Group:
    """An argument, or a field of one, of this type."""
    kind = next(option for option in get_args(hint) if option is not NoneType) if NoneType in get_args(hint) else hint
    own, optional = kind is not hint, optional or kind is not hint
    name = "_".join(names[1:]) or names[0]
    if kind == HW:
        sides = (_Leaf((*path, side), name, "SymInt", 0) for side, name in enumerate(("height", "width")))
        return _Group(lambda *hw: hw, tuple(sides))
    if kind is Tensor:
        return _Leaf(path, name, "Tensor?" if optional else "Tensor", 0 if path == (0,) else 1)
    if kind in _NUMBERS:
        return _Leaf(path, name, _NUMBERS[kind], 2)
    # a spec's rates of dropout are no arguments: those are its fields with a default, which come last
    fields = [field for field in kind._fields if kind not in _SPECS or field not in kind._field_defaults]
    hints = get_type_hints(kind)
    parts = (_parsed(hints[field], (*path, i), (*names, field), optional) for i, field in enumerate(fields))
    return _Group(kind, tuple(parts), own)


def _leaves(part: _Leaf | _Group) -> Iterator[_Leaf]:
    if isinstance(part, _Leaf):
        yield part
    else:
        for inner in part.parts:
            yield from _leaves(inner)


def _placed(part: _Leaf | _Group, places: Mapping[tuple[int, ...], int]) -> Any:
    """The same with the place of each leaf among the flat arguments instead of the leaf."""
    if isinstance(part, _Leaf):
        return places[part.path]
    return part._replace(parts=tuple(_placed(inner, places) for inner in part.parts))


def _rebuilt(part: Any, flat: Sequence[Any]) -> Any:
    """The argument, or the field of one, that has these leaves."""
    if isinstance(part, int):
        return flat[part]
    values = [_rebuilt(inner, flat) for inner in part.parts]
    # a norm or linear that may be absent is so where it has no tensor; its epsilon says nothing
    if part.optional and not any(isinstance(value, Tensor) for value in values):
        return None
    return part.kind(*values)


def _at(arguments: Sequence[Any], leaf: _Leaf) -> Any:
    """A leaf's value; None, of a number 0.0, in what is absent."""
    value = arguments[leaf.path[0]]
    for field in leaf.path[1:]:
        if value is None:
            return 0.0 if leaf.type == "float" else None
        value = value[field]
    return value


class Signature:
    """The arguments of an op, as the contract has them and flat. All that types tell is read once, here."""

    def __init__(self, function: Callable) -> None:
        hints = get_type_hints(function)
        del hints["return"]
        # the last: an op that is called with them has a schema of its own, and hands them on itself
        self.mixes = hints.pop("products", None) is not None
        parsed = [_parsed(hint, (i,), (name,)) for i, (name, hint) in enumerate(hints.items())]
        leaves = [leaf for part in parsed for leaf in _leaves(part)]
        self._leaves = tuple(sorted(leaves, key=lambda leaf: leaf.order))
        places = {leaf.path: place for place, leaf in enumerate(self._leaves)}
        self._parts = [_placed(part, places) for part in parsed]

    def schema(self, names: Mapping[str, str], mixed: bool = False) -> str:
        """names: other ones for some of the leaves. mixed: with products."""
        flat = [f"{leaf.type} {names.get(leaf.name, leaf.name)}" for leaf in self._leaves]
        last = ["str backend", "ScalarType products"] if mixed else ["str backend"]
        return f"({', '.join([*flat, *last])}) -> Tensor"

    def read(self, inputs: Sequence[Any], mixed: bool) -> tuple[list[Any], str, tuple]:
        """Of what a registered op is called with: the flat arguments, the backend's name, and the products as the
        contract's op takes them after the others; mixed: are they among the inputs?
        """
        *flat, named = inputs[:-1] if mixed else inputs
        return flat, named, ((inputs[-1] if mixed else None),) if self.mixes else ()

    def scales(self, needed: Sequence[bool]) -> bool:
        """Is the gradient of a residual_scale among those needed of the flat arguments?"""
        return any(need and leaf.name == "residual_scale" for leaf, need in zip(self._leaves, needed, strict=True))

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        return [_at(arguments, leaf) for leaf in self._leaves]

    def arguments(self, flat: Sequence[Any]) -> tuple:
        return tuple([_rebuilt(part, flat) for part in self._parts])


# -- the registered ops ------------------------------------------------------------------------------------------------


def _register(
    op: str, signature: Signature, name: str, names: Mapping[str, str], mixed: bool = False
) -> torch.library.CustomOpDef:
    """Register the contract's `op` as `pvt_fast::<name>`; mixed: with products."""

    def run(*inputs: Any) -> Tensor:
        ops.refuse_forward_mode(f"pvt_fast::{name}")
        flat, named, products = signature.read(inputs, mixed)
        backend = dispatch.load(named.removesuffix(_IN_GRAPH), f"pvt_fast::{name}: backend")
        with within_graph() if named.endswith(_IN_GRAPH) else nullcontext():
            output = getattr(backend, op)(*signature.arguments(flat), *products)
        return _tokens(output).contiguous()  # the fake implementations promise compact strides

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if value is None else value[0] for value in ctx.rest]
        flat, named, products = signature.read(inputs, mixed)
        no_gradients = (None,) * (len(ctx.rest) - len(flat))
        backend = dispatch.load(named.removesuffix(_IN_GRAPH), f"pvt_fast::{name}: backend")
        needed = list(ctx.needs_input_grad[: len(flat)])
        # else they are to be differentiated in their turn
        if op in backend.backward and not torch.is_grad_enabled() and not signature.scales(needed):
            found = iter(_backward_of(op, mixed)(grad_output, needed, *inputs))
            return *(next(found) if need else None for need in needed), *no_gradients

        def recompute(*inputs: Any) -> Tensor:
            return _tokens(getattr(reference, op)(*signature.arguments(inputs), *products))

        return *_reference_gradients(recompute, flat, needed, grad_output), *no_gradients

    def fake(*inputs: Any) -> Tensor:
        flat, _, products = signature.read(inputs, mixed)
        shape, dtype = ops.output_like(op, *signature.arguments(flat), *products)
        return flat[0].new_empty(shape, dtype=dtype)

    schema = signature.schema(names, mixed)
    registered = torch.library.custom_op(f"pvt_fast::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    registered.register_autograd(backward, setup_context=setup_context)
    return registered


@cache
def _backward_of(op: str, mixed: bool) -> torch.library.CustomOpDef:
    """The gradients that backends have of their own as an op: opaque, as the op is, to what traces a backward."""
    signature = SIGNATURES[op]

    def run(grad_output: Tensor, needed: Sequence[bool], *inputs: Any) -> list[Tensor]:
        flat, named, products = signature.read(inputs, mixed)
        backend = dispatch.load(named.removesuffix(_IN_GRAPH), f"pvt_fast::{op}: backend")
        tensors = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]
        with within_graph() if named.endswith(_IN_GRAPH) else nullcontext():
            found = backend.backward[op](
                grad_output, [needed[place] for place in tensors], *signature.arguments(flat), *products
            )
        if len(found) != len(tensors):
            raise ValueError(
                f"{op}: the backward of backend {backend.name!r} must return {len(tensors)} gradients, got {len(found)}"
            )
        given = [gradient for place, gradient in zip(tensors, found, strict=True) if needed[place]]
        if any(gradient is None for gradient in given):
            raise ValueError(f"{op}: the backward of backend {backend.name!r} must return all needed, got None for one")
        return given  # type: ignore[return-value]  # none is None

    def fake(grad_output: Tensor, needed: Sequence[bool], *inputs: Any) -> list[Tensor]:
        return [torch.empty_like(value) for value, need in zip(inputs, needed, strict=False) if need]

    schema = signature.schema({}, mixed).removeprefix("(").replace("-> Tensor", "-> Tensor[]")
    name = f"pvt_fast::{'mixed_' if mixed else ''}{op}_backward"
    registered = torch.library.custom_op(
        name, run, mutates_args=(), schema=f"(Tensor grad_output, bool[] needed, {schema}"
    )
    registered.register_fake(fake)
    return registered


def _reference_gradients(
    recompute: Callable[..., Tensor], arguments: Sequence[Any], needed: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `recompute(*arguments)` by autograd; None for the arguments whose gradient is not needed.

    Where the gradients are to be differentiated in their turn (create_graph=True), they hang on the arguments' graph.
    """
    again = torch.is_grad_enabled()
    leaves = [
        value
        if not isinstance(value, Tensor)
        # a view for each argument: the same tensor may be several
        else value.view_as(value)
        if again and value.requires_grad
        else value.detach().requires_grad_(need)
        for value, need in zip(arguments, needed, strict=True)
    ]
    # forwards run without autocast, but a backward may run within one; the meta device has none
    device = "cpu" if grad_output.is_meta else grad_output.device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        output = recompute(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=again, allow_unused=True))
    return tuple(next(grads) if need else None for need in needed)


def _tokens(output: Tensor | tuple[Tensor, HW]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


SIGNATURES = {op: Signature(getattr(reference, op)) for op in ops.NAMES}
_OPS = {op: _register(op, signature, op, {}) for op, signature in SIGNATURES.items()}
_MIXED_OPS = {
    op: _register(op, signature, f"mixed_{op}", {}, mixed=True)
    for op, signature in SIGNATURES.items()
    if signature.mixes
}
for _name, _op in _earlier.OPS.items():
    _register(_op, SIGNATURES[_op], _name, _EARLIER_ARGUMENTS[_op])


# -- what a model calls that is traced or needs gradients --------------------------------------------------------------


class RegisteredOps:
    """The contract over the registered ops, for one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def patch_embed(
        self, image: Tensor, w: PatchEmbedWeights, stride: int, products: torch.dtype | None = None
    ) -> tuple[Tensor, HW]:
        hw = ops.check_patch_embed(image, w, stride, products)
        return self._run("patch_embed", image, w, stride, products=products), hw

    def attention(
        self,
        x: Tensor,
        hw: HW,
        w: AttentionWeights,
        spec: AttentionSpec,
        residual_scale: Tensor | None = None,
        products: torch.dtype | None = None,
    ) -> Tensor:
        ops.check_attention(x, hw, w, spec, residual_scale, products)
        self._refuse_dropout("attention", spec)
        return self._run("attention", x, hw, w, spec, residual_scale, products=products)

    def mlp(
        self,
        x: Tensor,
        hw: HW,
        w: MlpWeights,
        spec: MlpSpec,
        residual_scale: Tensor | None = None,
        products: torch.dtype | None = None,
    ) -> Tensor:
        ops.check_mlp(x, hw, w, spec, residual_scale, products)
        self._refuse_dropout("mlp", spec)
        return self._run("mlp", x, hw, w, spec, residual_scale, products=products)

    def layer_norm(self, x: Tensor, w: Norm) -> Tensor:
        ops.check_layer_norm(x, w)
        return self._run("layer_norm", x, w)

    def head(self, x: Tensor, w: Linear | None, products: torch.dtype | None = None) -> Tensor:
        ops.check_head(x, w, products)
        return self._run("head", x, w, products=products)

    def _run(self, op: str, *arguments: Any, products: torch.dtype | None = None) -> Tensor:
        flat = SIGNATURES[op].flat(arguments)
        if products is None:
            return _OPS[op](*flat, self.backend)
        return _MIXED_OPS[op](*flat, self.backend, products)

    def _refuse_dropout(self, op: str, spec: AttentionSpec | MlpSpec) -> None:
        if spec.drops:
            raise ValueError(f"{op}: spec must be without dropout on {self.backend!r}, got {spec}")


def registered(backend: str) -> Backend | RegisteredOps:
    """The ops of a backend in a form that can be traced and has gradients."""
    if backend == "reference":
        return reference.BACKEND
    in_graph = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return RegisteredOps(backend + _IN_GRAPH if in_graph else backend)


def requested(own: str) -> str:
    """The backend asked for, in a form that a compiled graph is guarded by."""
    return dispatch.seen_by_compiler.default if own == "auto" else own
