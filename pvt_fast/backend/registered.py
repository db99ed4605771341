"""The ops of the contract as registered `torch.library` ops: for gradients, torch.compile and torch.export.

They are the one way to gradients, too: whatever needs one calls `torch.ops.pvt_fast.*`, whose backward recomputes the
op with the reference, so that a training step keeps only each op's arguments alive, not its inner activations. Without
gradients eager code calls a backend's functions directly: a registered op costs microseconds a call.

`registered(name)` answers the ops of the contract: for "reference" that itself, so that a compiler sees plain torch and
fuses it, else the registered ones, opaque to the compiler, which hand on to the backend named in their last argument.
Compiled without gradients, a model on a backend that knows whole models is called once for all of its ops, by
`run_model`.

The choice of a backend is made while tracing and baked into the graph. A change of `model.backend`, or of
`use_backend`, retraces a compiled model; an exported one keeps its backend.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import ops
from ..accelerate.guard import ambient
from ..ops import HW, AttentionSpec, AttentionWeights, Linear, MlpSpec, MlpWeights, Norm, PatchEmbedWeights, reference
from ..ops.packing import within_graph
from . import dispatch

if TYPE_CHECKING:
    from ..model import PVT_V2


# What follows the backend's name in an op that was traced into a graph, which may change weights after it.
_IN_GRAPH = " in a graph"


# -- registered ops: each takes flat arguments, which `_arguments` turns into those of the contract ------------------


def _register(
    schema: str, function: Callable, arguments: Callable[..., tuple], shape: Callable[..., Sequence[int]]
) -> torch.library.CustomOpDef:
    """Register `pvt_fast::<name of function>`; `arguments(*flat)` takes all but the backend's name.

    shape(*arguments): that of the result, of arguments that were checked: also of tensors without values.
    """
    name = function.__name__

    def run(*flat: Any) -> Tensor:
        ops.refuse_forward_mode(f"pvt_fast::{name}")
        *given, named = flat
        backend = named.removesuffix(_IN_GRAPH)
        module = dispatch.named(backend, f"pvt_fast::{name}: backend")
        with within_graph() if named != backend else nullcontext():
            output = getattr(module, name)(*arguments(*given))
        return _tokens(output).contiguous()  # the fake implementations promise compact strides

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        saved = iter(ctx.saved_tensors)
        flat = tuple(next(saved) if value is None else value[0] for value in ctx.rest)

        def recompute(*inputs: Any) -> Tensor:
            return _tokens(function(*arguments(*inputs[:-1])))

        return _reference_gradients(recompute, flat, ctx.needs_input_grad, grad_output)

    op = torch.library.custom_op(f"pvt_fast::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(lambda *flat: flat[0].new_empty(shape(*arguments(*flat[:-1]))))
    op.register_autograd(backward, setup_context=setup_context)
    return op


def _reference_gradients(
    recompute: Callable[..., Tensor], arguments: tuple, needed: Sequence[bool], grad_output: Tensor
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
    # the ops stand in without autocast only, but a backward may lie within one; the meta device knows none
    device = "cpu" if grad_output.is_meta else grad_output.device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        output = recompute(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=again, allow_unused=True))
    return tuple(next(grads) if need else None for need in needed)


def _tokens(output: Tensor | tuple[Tensor, HW]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm | None:
    return None if weight is None and bias is None else Norm(weight, bias, eps)  # type: ignore[arg-type]  # checked


def _linear(weight: Tensor | None, bias: Tensor | None) -> Linear | None:
    return None if weight is None and bias is None else Linear(weight, bias)  # type: ignore[arg-type]  # checked


def _embed_arguments(image, weight, bias, norm_weight, norm_bias, eps, stride) -> tuple:
    return image, PatchEmbedWeights(Linear(weight, bias), Norm(norm_weight, norm_bias, eps)), stride


def _embed_shape(image: Tensor, w: PatchEmbedWeights, stride: int) -> Sequence[int]:
    height, width = ops.check_patch_embed(image, w, stride)
    return image.shape[0], height * width, w.proj.weight.shape[0]


def _attention_arguments(x: Tensor, height: int, width: int, *rest: Any) -> tuple:
    norm, q, kv, sr, sr_norm, proj = zip(rest[:12:2], rest[1:12:2], strict=True)
    residual_scale, eps, sr_eps, num_heads, scale, linear = rest[12:]
    weights = AttentionWeights(
        Norm(*norm, eps), Linear(*q), Linear(*kv), _linear(*sr), _norm(*sr_norm, sr_eps), Linear(*proj)
    )
    return x, (height, width), weights, AttentionSpec(num_heads, scale, linear), residual_scale


def _attention_shape(x: Tensor, *rest: Any) -> Sequence[int]:
    ops.check_attention(x, *rest)
    return x.shape


def _mlp_arguments(x: Tensor, height: int, width: int, *rest: Any) -> tuple:
    norm, fc1, dwconv, fc2 = zip(rest[:8:2], rest[1:8:2], strict=True)
    residual_scale, eps, relu = rest[8:]
    weights = MlpWeights(Norm(*norm, eps), Linear(*fc1), Linear(*dwconv), Linear(*fc2))
    return x, (height, width), weights, MlpSpec(relu), residual_scale


def _mlp_shape(x: Tensor, *rest: Any) -> Sequence[int]:
    ops.check_mlp(x, *rest)
    return x.shape


def _layer_norm_arguments(x, weight, bias, eps) -> tuple:
    return x, Norm(weight, bias, eps)


def _layer_norm_shape(x: Tensor, w: Norm) -> Sequence[int]:
    ops.check_layer_norm(x, w)
    return x.shape


def _head_arguments(x, weight, bias) -> tuple:
    return x, _linear(weight, bias)


def _head_shape(x: Tensor, w: Linear | None) -> Sequence[int]:
    ops.check_head(x, w)
    return x.shape[0], x.shape[2] if w is None else w.weight.shape[0]


_embed = _register(
    "(Tensor image, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, float eps, int stride, "
    "str backend) -> Tensor",
    reference.overlap_patch_embed,
    _embed_arguments,
    _embed_shape,
)
_attention = _register(
    "(Tensor x, SymInt height, SymInt width, Tensor norm_weight, Tensor norm_bias, Tensor q_weight, Tensor? q_bias, "
    "Tensor kv_weight, Tensor? kv_bias, Tensor? sr_weight, Tensor? sr_bias, Tensor? sr_norm_weight, "
    "Tensor? sr_norm_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? residual_scale, float eps, float sr_eps, "
    "int num_heads, float scale, bool linear, str backend) -> Tensor",
    reference.sr_attention,
    _attention_arguments,
    _attention_shape,
)
_mlp = _register(
    "(Tensor x, SymInt height, SymInt width, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor dwconv_weight, Tensor? dwconv_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? residual_scale, float eps, bool relu, str backend) -> Tensor",
    reference.dwconv_mlp,
    _mlp_arguments,
    _mlp_shape,
)
_layer_norm = _register(
    "(Tensor x, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    reference.layer_norm,
    _layer_norm_arguments,
    _layer_norm_shape,
)
_head = _register(
    "(Tensor x, Tensor? weight, Tensor? bias, str backend) -> Tensor", reference.head, _head_arguments, _head_shape
)


# -- a whole model as one op ------------------------------------------------------------------------------------------

# A compiled graph holds a model by its number, which its guards compare, and which no copy of the model shares.
_models: WeakValueDictionary[int, PVT_V2] = WeakValueDictionary()
_numbers = itertools.count()


def number(model: PVT_V2) -> int:
    """A number under which `run_model` finds this model, new at each call."""
    _models[given := next(_numbers)] = model
    return given


def _run_model(image: Tensor, parameters: list[Tensor], model: int, classes: int) -> Tensor:
    from ..model import PVT_V2  # which imports this module

    ops.refuse_forward_mode("pvt_fast::run_model")
    whole = _models[model]
    if not parameters:  # the model's own, whatever they are by now
        return PVT_V2.forward(whole, image)  # a subclass's forward is traced, and calls this
    with within_graph():
        return PVT_V2.forward(_with_parameters(whole, parameters), image)


def _with_parameters(model: PVT_V2, parameters: list[Tensor]) -> PVT_V2:
    """The model itself where `parameters` are its own, in its order; else a copy that has them instead."""
    pairs = list(zip(model.parameters(), parameters, strict=True))
    if all(own is given for own, given in pairs):
        return model
    return copy.deepcopy(model, {id(own): given for own, given in pairs})


_library = torch.library.Library("pvt_fast", "FRAGMENT")
_library.define("run_model(Tensor image, Tensor[] parameters, int model, int classes) -> Tensor")
_library.impl("run_model", _run_model, "CompositeExplicitAutograd")
torch.library.register_fake(
    "pvt_fast::run_model",
    lambda image, parameters, model, classes: image.new_empty((image.shape[0], classes)),
    lib=_library,
)


def _is_all_that_is_traced(model: int) -> bool:
    """Is the graph being traced the forward of this model and nothing else, as in `torch.compile(model)`?

    Then nothing in it can change the model's parameters or put others in their place, and the graph need not hold
    them: to guard and to check some hundreds of inputs takes longer than the Python of a small model in eager mode.
    The names are the compiler's own and may change; "no" is always right, only slower.
    """
    from ..model import PVT_V2  # which imports this module

    symbolic_convert = sys.modules.get("torch._dynamo.symbolic_convert")
    try:
        root = symbolic_convert.InstructionTranslator.current_tx().output.root_tx  # type: ignore[union-attr]
        return root.f_code is PVT_V2.forward.__code__ and root.f_locals["self"] is _models[model]
    except (AttributeError, KeyError):
        return False


def _stands_whole(model: int) -> bool:
    """Do the ops stand in for all of this model now, on a backend that knows whole models?"""
    return _models[model].stands_whole()


def run_whole(model: PVT_V2, image: Tensor) -> Tensor | None:
    """A traced model's logits by one op; None where gradients, training, export or the model's state forbid it."""
    if torch.is_grad_enabled() or model.training or torch.compiler.is_exporting() or ambient() is not None:
        return None
    if requested(model.backend) == "reference" or not _stands_whole(model._number):
        return None
    parameters = [] if _is_all_that_is_traced(model._number) else list(model.parameters())
    classes = model.head.weight.shape[0]  # type: ignore[index]
    return torch.ops.pvt_fast.run_model(image, parameters, model._number, classes)


def requested(own: str) -> str:
    """The backend asked for, in a form that a compiled graph is guarded by."""
    return dispatch.traced.default if own == "auto" else own


# -- what a model calls that is traced or needs gradients --------------------------------------------------------------


class RegisteredOps:
    """The contract over the registered ops, for one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def overlap_patch_embed(self, image: Tensor, w: PatchEmbedWeights, stride: int) -> tuple[Tensor, HW]:
        hw = ops.check_patch_embed(image, w, stride)
        return _embed(image, *w.proj[:2], *w.norm[:3], stride, self.backend), hw

    def sr_attention(
        self, x: Tensor, hw: HW, w: AttentionWeights, spec: AttentionSpec, residual_scale: Tensor | None = None
    ) -> Tensor:
        ops.check_attention(x, hw, w, spec, residual_scale)
        if spec.attn_drop or spec.proj_drop:
            raise ValueError(f"sr_attention: spec must be without dropout on {self.backend!r}, got {spec}")
        sr = (None, None) if w.sr is None else w.sr[:2]
        sr_norm = (None, None, 0.0) if w.sr_norm is None else w.sr_norm[:3]
        tensors = (*w.norm[:2], *w.q[:2], *w.kv[:2], *sr, *sr_norm[:2], *w.proj[:2], residual_scale)
        numbers = (w.norm.eps, sr_norm[2], spec.num_heads, spec.scale, spec.linear)
        return _attention(x, *hw, *tensors, *numbers, self.backend)

    def dwconv_mlp(
        self, x: Tensor, hw: HW, w: MlpWeights, spec: MlpSpec, residual_scale: Tensor | None = None
    ) -> Tensor:
        ops.check_mlp(x, hw, w, spec, residual_scale)
        if spec.drop:
            raise ValueError(f"dwconv_mlp: spec must be without dropout on {self.backend!r}, got {spec}")
        tensors = (*w.norm[:2], *w.fc1[:2], *w.dwconv[:2], *w.fc2[:2], residual_scale)
        return _mlp(x, *hw, *tensors, w.norm.eps, spec.relu, self.backend)

    def layer_norm(self, x: Tensor, w: Norm) -> Tensor:
        ops.check_layer_norm(x, w)
        return _layer_norm(x, *w[:3], self.backend)

    def head(self, x: Tensor, w: Linear | None) -> Tensor:
        ops.check_head(x, w)
        return _head(x, *((None, None) if w is None else w[:2]), self.backend)


def registered(backend: str) -> ModuleType | RegisteredOps:
    """The ops of a backend in a form that can be traced and has gradients."""
    if backend == "reference":
        return reference
    in_graph = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return RegisteredOps(backend + _IN_GRAPH if in_graph else backend)


# What torch.compiler.assume_constant_result does; calling that imports torch._dynamo, seconds in every process.
for _answer in (_stands_whole, _is_all_that_is_traced):
    vars(_answer)["_dynamo_marked_constant"] = True
