"""Derivatives beyond the first gradient, and torch.func, on models that have run fused: those of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_models import MODELS, assert_rounding, image, plain
from op_calls import Call, calls, flat
from torch import Tensor, nn
from torch.autograd import forward_ad

from pvt_fast.backend import cpp
from pvt_fast.backend import registered as library

# torch's own use of it, at its first derivative in forward mode
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
KINDS = [(kind, linear) for kind in MODELS for linear in (False, True)]
kinds = pytest.mark.parametrize(("kind", "linear"), KINDS, ids=[f"{k}-{'linear' if li else 'sr'}" for k, li in KINDS])


def make(kind: str, linear: bool = False) -> nn.Module:
    """A model that has been called, whose every operation has second derivatives."""
    model = MODELS[kind](linear=linear)
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # torch's scaled_dot_product_attention on CPUs has none
            module.fused_attn = False
    with torch.no_grad():
        for _ in range(3):
            model(image())
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        pytest.param(*row, marks=[] if row in (("own", True), ("accelerated", False)) else pytest.mark.full)
        for row in KINDS
    ],
)
@torch.no_grad()
def test_transforms_within_a_compiled_function(kind, linear):
    torch._dynamo.reset()
    model, x = make(kind, linear), image()

    def vmapped(x: Tensor) -> Tensor:
        return torch.vmap(model)(x[:, None])

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(x)

    for call in (vmapped, gradient):
        assert_close([torch.compile(call, backend="aot_eager")(x)], [call(x)])
    torch._dynamo.reset()


def test_a_backward_within_autocast_is_that_of_the_forward():
    """The forward ran without; what the backward computes again of it must, too."""
    model = make("own")
    loss = model(image()).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(model(image()).square().mean(), list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).norm() <= 0.02 * their.norm()


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To rounding, of the largest value of each."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        scale = their.abs().max().clamp_min(1e-6)
        assert_rounding(our / scale, their / scale)


def penalty(call: Callable[[Tensor], Tensor], x: Tensor, wrt: list[Tensor]) -> Tensor:
    """The squared norm of gradients, which can be differentiated again."""
    grads = torch.autograd.grad(call(x).square().mean(), wrt, create_graph=True)
    return sum((grad.square().sum() for grad in grads), start=torch.zeros(()))


def both(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    return [model, lambda x: plain(lambda: model(x))]


@kinds
def test_a_gradient_penalty_on_the_image(kind, linear):
    model, found = make(kind, linear), []
    for call in both(model):
        x = image().requires_grad_()
        loss = call(x).square().mean() + 10 * penalty(call, x, [x])
        found.append([*torch.autograd.grad(loss, [x, *model.parameters()])])
    assert_close(*found)


@kinds
def test_a_gradient_penalty_on_the_weights(kind, linear):
    model, found = make(kind, linear), []
    for call in both(model):
        parameters = list(model.parameters())
        found.append([*torch.autograd.grad(penalty(call, image(), parameters), parameters)])
    assert_close(*found)


@pytest.mark.parametrize("kind", MODELS)
def test_a_gradient_penalty_in_training(kind):
    """Backward, step, and again: as projects use it."""
    model = make(kind)
    clone = copy.deepcopy(model)
    for one, call in ((model, both(model)[0]), (clone, both(clone)[1])):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            x = image().requires_grad_()
            (call(x).square().mean() + penalty(call, x, [x])).backward()
            optimizer.step()
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in clone.parameters()])


@pytest.mark.parametrize("kind", MODELS)
def test_a_product_with_the_hessian(kind):
    model, found = make(kind), []
    direction = image().flip(0)
    for call in both(model):
        x = image().requires_grad_()
        (grad,) = torch.autograd.grad(call(x).square().mean(), x, create_graph=True)
        found.append([*torch.autograd.grad((grad * direction).sum(), x)])
    assert_close(*found)


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_weights_and_a_penalty(kind):
    model, found = make(kind).requires_grad_(False), []
    model.head.requires_grad_(True)
    for call in both(model):
        x = image().requires_grad_()
        found.append([*torch.autograd.grad(penalty(call, x, [x]), [x, *model.head.parameters()], allow_unused=True)])
    ours, theirs = ([grad for grad in grads if grad is not None] for grads in found)
    assert_close(ours, theirs)


# -- torch.func --------------------------------------------------------------------------------------------------------


def parameters_of(model: nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: (factor * parameter).detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_functional_call(kind):
    model, x = make(kind), image()
    before = model(x)
    for factor in (1.25, 0.8):
        others = parameters_of(model, factor)
        for _ in range(3):
            answer = torch.func.functional_call(model, others, (x,))
        assert not torch.allclose(answer, before, rtol=1e-3, atol=1e-3)
        assert_rounding(answer, plain(lambda others=others: torch.func.functional_call(model, others, (x,))))
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_through_functional_call(kind):
    model, x, found = make(kind), image(), []
    for wrapper in (lambda call: call(), plain):
        others = {name: value.requires_grad_() for name, value in parameters_of(model, 1.25).items()}
        loss = wrapper(lambda others=others: torch.func.functional_call(model, others, (x,))).square().mean()
        found.append([*torch.autograd.grad(loss, list(others.values()))])
    assert_close(*found)


@pytest.mark.parametrize("kind", MODELS)
def test_grad(kind):
    model, x = make(kind), image()
    parameters = parameters_of(model, 1.0)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    ours = torch.func.grad(loss)(parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    theirs = torch.autograd.grad(plain(lambda: loss(leaves)), list(leaves.values()))
    assert_close(list(ours.values()), list(theirs))


@pytest.mark.parametrize("kind", MODELS)
def test_vmap_over_images(kind):
    model, x = make(kind), image(3)
    with torch.no_grad():
        answers = torch.func.vmap(lambda row: model(row[None])[0])(x)
        assert_rounding(answers, model(x))


@pytest.mark.parametrize("kind", MODELS)
def test_vmap_over_models(kind):
    """An ensemble, as torch.func.stack_module_state makes it."""
    models = [make(kind), make(kind)]
    base, x = copy.deepcopy(models[0]), image()
    parameters, buffers = torch.func.stack_module_state(models)
    with torch.no_grad():
        answers = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
        for answer, model in zip(answers, models, strict=True):
            assert_rounding(answer, model(x))


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_per_image(kind):
    model, x = make(kind), image(3)
    parameters = parameters_of(model, 1.0)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],)).square().mean()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        theirs = torch.autograd.grad(loss(leaves, row), list(leaves.values()))
        assert_close([grad[index] for grad in ours.values()], list(theirs))


@DEPRECATED
@pytest.mark.parametrize("kind", MODELS)
def test_jvp_and_vjp(kind):
    model, x, direction = make(kind), image(), image().flip(0)
    value, tangent = torch.func.jvp(model, (x,), (direction,))
    leaf = x.clone().requires_grad_()
    output = plain(lambda: model(leaf))
    assert_rounding(value.detach(), output.detach())
    cotangent = torch.ones_like(output)
    (grad,) = torch.autograd.grad(output, leaf, cotangent)
    assert_rounding((tangent * cotangent).sum().detach(), (grad * direction).sum())
    _, pull = torch.func.vjp(model, x)
    assert_close([pull(cotangent)[0].detach()], [grad])
    with torch.no_grad():
        assert_rounding(model(x), value.detach())


def small_op(op: str, call: Call) -> dict[str, Callable[[Tensor], Tensor]]:
    """By how it is called, `op` as a function of its activations."""
    name = "image" if op == "patch_embed" else "x"

    def of(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: function({**call, name: x})

    return {
        "cpp": of(lambda call: getattr(cpp, op)(**call)),
        **{
            f"torch.ops, {backend}": of(lambda call, b=backend: getattr(torch.ops.pvt_fast, op)(*flat(op, call, b)))
            for backend in ("cpp", "reference")
        },
        "RegisteredOps": of(lambda call: getattr(library.registered("cpp"), op)(**call)),
    }


@pytest.mark.parametrize("name", calls())
def test_ops_called_by_themselves_refuse_forward_mode(name):
    op, call = calls()[name]
    x = call.get("x", call.get("image"))
    for function in small_op(op, call).values():
        with pytest.raises(NotImplementedError, match=rf"{op}: forward-mode derivatives must be taken of"):
            torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            function(forward_ad.make_dual(x, x))
        function(x)


def test_graphs_of_ops_refuse_forward_mode():
    model, x = make("own").requires_grad_(False), image()
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager")
    for function in (exported, compiled):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            function(forward_ad.make_dual(x, x))
        assert_rounding(function(x), plain(lambda: model(x)))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(exported, (x,), (x,))
