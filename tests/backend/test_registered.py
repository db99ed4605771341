"""The registered ops: their schemas, derived from the contract, and whose backward they take."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from op_calls import calls
from torch import Tensor

from pvt_fast.backend import cpp, registered
from pvt_fast.ops import Linear, Norm, map_tensors, reference, tensors_in
from pvt_fast.testing import MlpCase

CALLS = calls()

# What programs that were exported or packaged with the first release have written down: never to change.
RELEASED = {
    "overlap_patch_embed": "(Tensor image, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, "
    "float eps, int stride, str backend) -> Tensor",
    "sr_attention": "(Tensor x, SymInt height, SymInt width, Tensor norm_weight, Tensor norm_bias, Tensor q_weight, "
    "Tensor? q_bias, Tensor kv_weight, Tensor? kv_bias, Tensor? sr_weight, Tensor? sr_bias, Tensor? sr_norm_weight, "
    "Tensor? sr_norm_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? residual_scale, float eps, float sr_eps, "
    "int num_heads, float scale, bool linear, str backend) -> Tensor",
    "dwconv_mlp": "(Tensor x, SymInt height, SymInt width, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor dwconv_weight, Tensor? dwconv_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? residual_scale, float eps, bool relu, str backend) -> Tensor",
    "layer_norm": "(Tensor x, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    "head": "(Tensor x, Tensor? weight, Tensor? bias, str backend) -> Tensor",
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_ops_keep_their_schemas(name):
    assert str(getattr(torch.ops.pvt_fast, name).default._schema) == f"pvt_fast::{name}{RELEASED[name]}"


@pytest.mark.parametrize(
    ("name", "op"), [("overlap_patch_embed", "patch_embed"), ("sr_attention", "attention"), ("dwconv_mlp", "mlp")]
)
def test_released_ops_give_what_those_of_today_give(name, op):
    flat = registered.SIGNATURES[op].flat(tuple(CALLS[op][1].values()))
    ours = [getattr(torch.ops.pvt_fast, each)(*flat, "cpp") for each in (name, op)]
    assert torch.equal(*ours)


@pytest.mark.parametrize("name", CALLS)
def test_flat_arguments_are_the_contracts_again(name):
    op, call = CALLS[name]
    signature = registered.SIGNATURES[op]
    again = signature.arguments(signature.flat(tuple(call.values())))
    assert len(again) == len(call)
    for value, given in zip(again, call.values(), strict=True):
        assert repr(value) == repr(given)


class Weights(NamedTuple):
    """As of an op that is not there yet."""

    norm: Norm
    gate: Linear
    extra: Linear | None


def test_a_new_weight_field_is_an_argument_without_more():
    def op(x: Tensor, w: Weights, scale: float, residual_scale: Tensor | None = None) -> Tensor: ...

    op.__annotations__.update(x=Tensor, w=Weights)
    signature = registered.Signature(op)
    assert signature.schema({}) == (
        "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor gate_weight, Tensor? gate_bias, Tensor? extra_weight, "
        "Tensor? extra_bias, Tensor? residual_scale, float norm_eps, float scale, str backend) -> Tensor"
    )
    x = torch.zeros(2)
    given = (x, Weights(Norm(x, x, 0.5), Linear(x, None), None), 2.0, None)
    assert repr(signature.arguments(signature.flat(given))) == repr(given)


# -- gradients --------------------------------------------------------------------------------------------------------


def arguments() -> tuple:
    made = MlpCase(2, (6, 5), 16, 24, scale_residual=True).make(torch.float32)
    given = map_tensors(made, lambda tensor: tensor.detach().clone().requires_grad_())
    given[4].requires_grad_(False)  # a residual_scale's gradient is the reference's, and with it all others
    return given


def test_a_backends_own_backward_is_taken(add_backend):
    """All that a backend does for it is to name the function."""
    seen = []

    def mlp_backward(grad_output, needed, x, hw, w, spec, residual_scale, products):
        assert products is None
        seen.append((grad_output.shape, hw, spec))
        assert len(needed) == len(tensors_in((x, hw, w, spec, residual_scale)))
        return [
            torch.full_like(tensor, 7.0) if need else None
            for tensor, need in zip(tensors_in((x, hw, w, spec, residual_scale)), needed, strict=True)
        ]

    add_backend(replace(cpp.BACKEND, backward={"mlp": mlp_backward}))
    given = arguments()
    given[2].fc1.weight.requires_grad_(False)
    registered.registered("cpp").mlp(*given).sum().backward()
    assert seen == [(given[0].shape, given[1], given[3])]
    for tensor in tensors_in(given):
        assert bool((tensor.grad == 7.0).all()) if tensor.requires_grad else tensor.grad is None


def test_without_one_it_is_the_references(add_backend):
    def of_another_op(*_):
        raise AssertionError("it is not attention that is differentiated")

    add_backend(replace(cpp.BACKEND, backward={"attention": of_another_op}))
    ours, plain = arguments(), arguments()
    registered.registered("cpp").mlp(*ours).sum().backward()
    reference.mlp(*plain).sum().backward()
    for own, other in zip(tensors_in(ours), tensors_in(plain), strict=True):
        assert own.grad is other.grad is None or torch.equal(own.grad, other.grad)


def test_that_of_a_residual_scale_is_the_references(add_backend):
    def refuse(*_):
        raise AssertionError("it is not asked for that")

    add_backend(replace(cpp.BACKEND, backward={"mlp": refuse}))
    given = arguments()
    given[4].requires_grad_()
    registered.registered("cpp").mlp(*given).sum().backward()
    assert given[4].grad.abs().sum() > 0


def test_gradients_to_be_differentiated_are_the_references(add_backend):
    def refuse(*_):
        raise AssertionError("it cannot be differentiated")

    add_backend(replace(cpp.BACKEND, backward={"mlp": refuse}))
    given = arguments()
    (grad,) = torch.autograd.grad(registered.registered("cpp").mlp(*given).sum(), given[0], create_graph=True)
    grad.square().sum().backward()
    assert given[2].fc1.weight.grad.abs().sum() > 0


def test_a_backward_of_no_op_and_one_that_returns_too_few_are_refused(add_backend):
    with pytest.raises(ValueError, match=r"Backend: backward must name ops \(patch_embed, .*\), got 'sr_attention'"):
        replace(cpp.BACKEND, backward={"sr_attention": lambda *_: []})
    add_backend(replace(cpp.BACKEND, backward={"mlp": lambda *_: [None, None]}))
    with pytest.raises(ValueError, match="mlp: the backward of backend 'cpp' must return 10 gradients, got 2"):
        registered.registered("cpp").mlp(*arguments()).sum().backward()
    add_backend(replace(cpp.BACKEND, backward={"mlp": lambda *_: [None] * 10}))
    with pytest.raises(ValueError, match="mlp: the backward of backend 'cpp' must return all needed, got None for one"):
        registered.registered("cpp").mlp(*arguments()).sum().backward()
